"""Answers about pieces of rollouts move the policy itself (DPO)."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.labeling.answers import FILE, Answers, Pair
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl import behaviours, direct, objective, segments, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, ReinforceConfig, UpdateConfig
from robovlms_jax.rl.segments import Segment
from robovlms_jax.runs import build, preferring
from robovlms_jax.training import stages, step
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from robovlms_jax.training.state import create
from tests import toy
from tests.labeling.made_up import rollouts
from tests.rl.test_learning import HEADS, policy
from tests.rl.test_objective import Bandit, start
from tests.rl.test_rollouts import SIZES, encode


def compared(first: np.ndarray, second: np.ndarray, first_better: np.ndarray, **changes) -> direct.Compared:
    """Pairs of pieces of float32[N, K] actions, by the bandit that `start` is."""
    actions = jnp.stack([jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)], axis=1)[..., None, None]
    flat = behaviours.Chosen(actions.reshape(-1, 1, 1))
    known = Bandit().reconsider(start(), None, flat, 1).log_prob.reshape(actions.shape)
    mask = jnp.ones(actions.shape[:-1], bool)
    batch = direct.Compared(None, behaviours.Chosen(actions), mask, known, jnp.asarray(first_better, jnp.float32))
    return batch.replace(**changes)


def moved(mean: float) -> dict:
    return {**start(), "head": {"mean": jnp.float32(mean)}}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_loss_is_log_2_before_anything_has_moved_and_its_gradient_goes_to_the_better_piece(noise):
    batch = compared([[-0.3], [-0.4]], [[-0.8], [-0.6]], [1.0, 1.0])
    loss = direct.DirectLoss(Bandit(), 0.1, noise)
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = both(start(), batch, None, loss.count(batch))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
    assert metrics["margin"] == 0 and abs(metrics["from_reference"]) < 1e-6
    # (1 - noise) of -sigmoid(0) beta ((a+ - mean) - (a- - mean)) / std^2, averaged over both pairs
    by_hand = -(1 - noise) * 0.5 * 0.1 * np.mean([0.5, 0.2]) / 0.2**2
    np.testing.assert_allclose(gradient["head"]["mean"], by_hand, rtol=1e-4)


def test_the_loss_of_two_pieces_is_that_worked_out_by_hand_and_what_is_outside_a_piece_does_not_count():
    """The mean goes from -0.5 to -0.4; log pi - log ref = ((a + .5)^2 - (a + .4)^2) / (2 .2^2) = (.2 a + .09) / .08."""
    mask = jnp.array([[[True, True], [True, False]]])[..., None]
    batch = compared([[0.0, -0.45]], [[-0.85, 9.0]], [0.0], mask=mask)
    worth = 0.1 * np.array([(0.09 + 0.0) / 0.08, (-0.17 + 0.09) / 0.08])  # of -0.45 it is 0
    loss = direct.DirectLoss(Bandit(), 0.1, 0.0)
    value, metrics = jax.jit(loss)(moved(-0.4), batch, None, 1.0)
    np.testing.assert_allclose(value, np.log1p(np.exp(worth[0] - worth[1])), rtol=1e-4)
    np.testing.assert_allclose(metrics["margin"], worth[1] - worth[0], rtol=1e-4)
    assert metrics["preferred"] == 0  # the answer was that the second is better
    equal = jax.jit(loss)(moved(-0.4), batch.replace(first_better=jnp.array([0.5])), None, 1.0)[1]
    assert equal["preferred"] == 0.5 and equal["loss"] > np.log(2)


def test_a_bandit_ends_where_the_answers_say_it_should_and_preferred_actions_gain_likelihood():
    """Answers as of a reward of 0.5 a. The best policy is the first one times exp(0.5 a / beta): a Gaussian whose mean
    is 0.5 std^2 / beta = 0.2 further."""
    rng = np.random.default_rng(0)
    actions = rng.normal(-0.5, 0.4, (64, 2, 1)).astype(np.float32)
    first_better = 1 / (1 + np.exp(-0.5 * (actions[:, 0, 0] - actions[:, 1, 0])))
    batch = compared(actions[:, 0], actions[:, 1], first_better)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    (stage,) = stages.plan(TrainConfig(steps=60, trainable=("^head/",)), OptimizerConfig(learning_rate=2e-2))
    begin = jax.device_put(start(), meshes.replicated(mesh))
    state, loss = create(begin, stage.trainable, stage.tx, 0, mesh), direct.DirectLoss(Bandit(), 0.1, 0.0)
    update = step.make_train_step(loss, stage.tx, stage.learning_rate, state, mesh)
    losses = []
    for _ in range(60):
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(2)) < 1e-5 and losses[-1] < losses[0]
    assert metrics["preferred"] == 1
    np.testing.assert_allclose(state.params["head"]["mean"], -0.3, atol=0.01)
    now, then = (
        np.asarray(Bandit().reconsider(params, None, behaviours.Chosen(actions.reshape(-1, 1, 1)), 1).log_prob)
        for params in (state.params, start())
    )
    gained = (now - then).reshape(64, 2)
    rows, better = np.arange(64), (first_better < 0.5).astype(int)
    assert gained[rows, better].mean() > 0 > gained[rows, 1 - better].mean()


def test_pieces_are_cut_out_of_decisions_action_by_action():
    """Rollouts of 12 and 7 control steps, decisions of 5: pieces may begin and end within one."""
    counts = rollouts((12, 7), ("open_drawer",) * 2).decisions(5)
    np.testing.assert_array_equal(counts, [3, 2])
    number = np.arange(5.0)  # of the decision, over both rollouts
    known = direct.Known(objective.View(None, number, None), behaviours.Chosen(number), number[:, None, None])
    pieces = direct.Pieces(
        np.array([[0, 1], [1, 0]]), np.array([[7, 0], [2, 3]]), np.array([[5, 7], [5, 2]]), np.array([1.0, 0.5])
    )
    found = direct.Comparisons(pieces, known, counts, 5, 19).take(np.array([0, 1]))
    wanted = [[(1, 3, [2, 3, 4]), (2, 2, [0, 1])], [(3, 3, range(5)), (4, 4, [0, 1])]]
    for side, parts in enumerate(wanted):
        for place, (decision, _, executed) in enumerate(parts):
            assert found.view.features[0, side, place] == decision == found.reference[0, side, place, 0, 0]
            np.testing.assert_array_equal(np.flatnonzero(found.mask[0, side, place]), list(executed))
    np.testing.assert_array_equal(found.mask[1].sum((1, 2)), [5, 2])
    assert found.first_better.dtype == np.float32 and found.mask.shape == (2, 2, 2, 5)


def test_draws_are_kept_with_rollouts_and_a_file_without_them_is_read_all_the_same(tmp_path):
    found = rollouts((12, 7), ("open_drawer",) * 2)
    drawn = {"actions": np.arange(5 * 3 * 7, dtype=np.float32).reshape(5, 3, 7)}
    dataclasses.replace(found, decided=segments.Decided(5, drawn, '{"low": 1}')).save(tmp_path / "with.npz")
    again = segments.load(tmp_path / "with.npz").decided
    assert again.every == 5 and again.drawn.keys() == {"actions"}
    np.testing.assert_array_equal(again.drawn["actions"], drawn["actions"])
    assert again.units == '{"low": 1}'
    found.save(tmp_path / "without.npz")
    assert segments.load(tmp_path / "without.npz").decided is None
    dataclasses.replace(found, decided=segments.Decided(4, drawn)).save(tmp_path / "damaged.npz")
    assert segments.load(tmp_path / "damaged.npz").decided.every == 4  # 12 and 7 steps are 3 + 2 decisions of 4, too
    dataclasses.replace(found, decided=segments.Decided(3, drawn)).save(tmp_path / "damaged.npz")
    with pytest.raises(ValueError, match=r"damaged.npz is no file .*7 decisions, and draws of .*'actions': 5"):
        segments.load(tmp_path / "damaged.npz")


CONFIG = ReinforceConfig(
    checkpoint="RUN",
    tasks=("open_drawer",),
    image_size=(20, 12),
    group=3,
    held_out=0.0,
    update=UpdateConfig(method="dpo", minibatches=1),
)
ANSWERED = dataclasses.replace(CONFIG, group=ReinforceConfig.group, labels="somewhere")


def test_a_simulated_person_compares_rollouts_from_the_same_start_alone(monkeypatch):
    found = rollouts((12,) * 6, ("open_drawer",) * 6)
    worth = np.array([0.0, 1.0, 1.05, 5.0, 5.0, 4.0])
    monkeypatch.setattr(preferring.progress, "advance", lambda found, pieces, steps: worth[[x.rollout for x in pieces]])
    quiet = dataclasses.replace(CONFIG, update=dataclasses.replace(CONFIG.update, label_noise=0.0))
    pieces = preferring._simulated(quiet, found)
    pairs = {frozenset(pair) for pair in pieces.rollout.tolist()}
    assert pairs == {frozenset(x) for x in ((0, 1), (0, 2), (3, 5), (4, 5))}  # of those that it can tell apart
    assert (pieces.start == 0).all() and (pieces.steps == 12).all()
    better = np.where(pieces.first_better == 1, *pieces.rollout.T)
    assert {*better} == {1, 2, 3, 4}
    again = preferring._simulated(quiet, found)
    np.testing.assert_array_equal(pieces.rollout, again.rollout)
    assert len(preferring._simulated(dataclasses.replace(quiet, pairs=2), found).first_better) == 2


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """A folder with rollouts, what was drawn in them, and three answers."""
    monkeypatch.setattr(preferring.checkpoints, "locate", lambda path: path)
    monkeypatch.setattr(preferring.seals, "identity", lambda path: type("Seal", (), {"label": f"{path}-1"}))
    made = {"behaviour": {"spread": [0.2]}, "image_size": [20, 12], "checkpoint": "OTHER-1"}
    drawn = {"actions": np.zeros((4, 3, 7), np.float32)}
    found = dataclasses.replace(
        rollouts((10,) * 2, ("open_drawer",) * 2), made=json.dumps(made), decided=segments.Decided(5, drawn)
    )
    found.save(tmp_path / segments.FILE)
    kept = Answers(tmp_path / FILE, {"rollouts": segments.identity(tmp_path), "steps": 4, "every": 2})
    for number, answer in enumerate(("left", "skip", "equal")):
        kept.add(Pair(Segment(0, number), Segment(1, 1)), answer)
    return tmp_path


def test_a_persons_answers_are_learned_from_with_the_behaviour_that_their_rollouts_had(labels, caplog):
    config = dataclasses.replace(ANSWERED, labels=str(labels))
    found = preferring.resolved(config)
    assert found.behaviour == BehaviourConfig(spread=(0.2,))
    assert "are rollouts of another policy (OTHER-1) than the one that is improved (RUN-1)" in caplog.text
    pieces = preferring._answered(found, segments.load(labels))
    np.testing.assert_array_equal(pieces.start, [[0, 1], [2, 1]])
    np.testing.assert_array_equal(pieces.first_better, [1, 0.5])
    assert (pieces.steps == 4).all()
    before = preferring.identity(found.labels)
    about = {"rollouts": segments.identity(labels), "steps": 4, "every": 2}
    Answers(labels / FILE, about).add(Pair(Segment(0, 5), Segment(1, 1)), "skip")
    assert preferring.identity(found.labels) != before  # a stopped run would learn from other answers
    for changes, message in (
        ({"behaviour": BehaviourConfig(spread=(0.3,))}, r"made with behaviour .*leave --behaviour out"),
        ({"image_size": (40, 12)}, r"pictures of \[20, 12\] px, .* pass --image_size 20 12"),
        ({"update": UpdateConfig(method="dpo", minibatches=4)}, "2 answers to learn from, .*update.minibatches=4"),
    ):
        with pytest.raises(ValueError, match=message):
            preferring.resolved(dataclasses.replace(config, **changes))
    equal = {"rollouts": segments.identity(labels), "steps": 4, "every": 2}
    (labels / FILE).unlink()
    Answers(labels / FILE, equal).add(Pair(Segment(0, 0), Segment(1, 1)), "equal")
    with pytest.raises(ValueError, match="all of 1 answers say that both are as good, from which nothing is learned"):
        preferring.resolved(config)
    (labels / FILE).unlink()
    with pytest.raises(ValueError, match=r"has no answers; give some .* or leave --labels out"):
        preferring.resolved(config)
    rollouts().save(labels / segments.FILE)
    with pytest.raises(ValueError, match="did not keep what was drawn"):
        preferring.resolved(config)


@pytest.mark.parametrize("made", ["{", "[]", '{"image_size": [20, 12]}', '{"behaviour": {"sprea": [0.2]}}'])
def test_rollouts_that_say_nothing_of_how_they_were_made_are_named(labels, made):
    dataclasses.replace(segments.load(labels), made=made).save(labels / segments.FILE)
    with pytest.raises(ValueError, match=r"rollouts.npz does not say how its rollouts were made .*another --out"):
        preferring.resolved(dataclasses.replace(ANSWERED, labels=str(labels)))


@pytest.mark.parametrize("changes", [{"steps": None}, {"steps": 0}, {"every": "2"}, {"rollouts": None}])
def test_answers_that_do_not_say_what_they_are_about_are_named(labels, changes):
    head, *rows = (labels / FILE).read_text().splitlines()
    told = {name: x for name, x in (json.loads(head) | changes).items() if x is not None}
    (labels / FILE).write_text("\n".join([json.dumps(told), *rows, ""]))
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1 does not say what its answers are about"):
        preferring.resolved(dataclasses.replace(ANSWERED, labels=str(labels)))


def test_a_clip_beside_itself_is_no_answer(labels):
    with (labels / FILE).open("a") as file:
        file.write('{"left": [0, 1], "right": [0, 1], "answer": "left"}\n')
    with pytest.raises(ValueError, match=r"line 5 is about \[0, 1\] and \[0, 1\] .* no two clips"):
        preferring.resolved(dataclasses.replace(ANSWERED, labels=str(labels)))


def test_answers_about_tasks_that_are_not_trained_teach_nothing(tmp_path, caplog):
    found = rollouts((10,) * 4, ("open_drawer", "open_drawer", "turn_on_led", "turn_on_led"))
    found.save(tmp_path / segments.FILE)
    kept = Answers(tmp_path / FILE, {"rollouts": segments.identity(tmp_path), "steps": 4, "every": 2})
    kept.add(Pair(Segment(2, 0), Segment(3, 1)), "left")
    kept.add(Pair(Segment(0, 0), Segment(1, 1)), "right")
    config = dataclasses.replace(ANSWERED, labels=str(tmp_path), others=("turn_on_led",))
    pieces = preferring._answered(config, found)
    np.testing.assert_array_equal(pieces.rollout, [[0, 1]])
    np.testing.assert_array_equal(pieces.first_better, [0])
    assert "1 answers teach nothing: ['turn_on_led'] is not among" in caplog.text
    with pytest.raises(ValueError, match="no answers about close_drawer, only about open_drawer, turn_on_led; name"):
        preferring._answered(dataclasses.replace(config, tasks=("close_drawer",)), found)


def test_rollouts_of_another_program_are_not_taken_for_those_that_a_run_made(labels):
    elsewhere = dataclasses.replace(CONFIG, out=str(labels))
    with pytest.raises(ValueError, match=r"rollouts.npz is there: pass --resume .*another --out.*pass --labels"):
        preferring.resolved(elsewhere)
    assert preferring.resolved(dataclasses.replace(elsewhere, resume=True)).out == str(labels)


@pytest.mark.parametrize(
    ("head", "other", "message"),
    [
        ("lstm", "flow", r"another kind of head or chunk: .*expected \['actions'\]"),
        ("lstm", {"action_high": (0.5,) * 6}, r"mean something else than this policy's \(high: "),
        ("flow", {"num_steps": 4}, r"mean something else than this policy's \(head.num_steps: "),
        ("discrete", {"num_bins": 16}, r"mean something else than this policy's \(head.num_bins: "),
    ],
)
def test_draws_of_another_kind_or_in_other_units_are_refused(head, other, message):
    """Rollouts of another policy may be learned from, but not where its numbers mean other actions."""

    def of(name: str, **changes) -> types.SimpleNamespace:
        config = toy.make_model(chunk=3, **HEADS[name]).config
        inner = {field: x for field, x in changes.items() if hasattr(config.head, field)}
        outer = {field: x for field, x in changes.items() if field not in inner}
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, **inner), **outer)
        model = types.SimpleNamespace(config=config)
        return types.SimpleNamespace(model=model, behaviour=behaviours.make(config, BehaviourConfig()))

    def recorded(by: types.SimpleNamespace) -> segments.Rollouts:
        names = [field.name for field in dataclasses.fields(by.behaviour.drawn)]
        drawn = {name: np.zeros((4,) if name == "step" else (4, 3, 7), np.float32) for name in names}
        decided = segments.Decided(5, drawn, behaviours.units(by.model.config))
        return dataclasses.replace(rollouts((10,) * 2, ("open_drawer",) * 2), decided=decided)

    own = of(head)
    assert isinstance(direct.draws(recorded(own), own), own.behaviour.drawn)
    with pytest.raises(ValueError, match=message):
        direct.draws(recorded(of(other) if isinstance(other, str) else of(head, **other)), own)


def test_draws_without_a_probability_are_refused_before_anything_is_learned_from_them():
    known = np.zeros((3, 2, 7), np.float32)
    direct._require_probable(known)
    known[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match="drawn in 1 of 3 decisions of these rollouts has no finite probability"):
        direct._require_probable(known)


def test_a_simulated_person_who_can_tell_nothing_apart_is_said_to(monkeypatch):
    found = rollouts((12,) * 6, ("open_drawer",) * 6)
    monkeypatch.setattr(preferring.progress, "advance", lambda found, pieces, steps: np.zeros(len(pieces)))
    with pytest.raises(ValueError, match=r"can tell no two rollouts from the same start apart.*larger --pool"):
        preferring._require_enough(preferring._simulated(CONFIG, found), np.zeros(0, bool), CONFIG)


def test_tasks_that_the_simulated_person_does_not_know_are_refused_before_anything_is_made():
    with pytest.raises(ValueError, match=r"not \['lift_red_block_table'\]; leave .* --tasks, or ask a person"):
        preferring.resolved(dataclasses.replace(CONFIG, tasks=("open_drawer", "lift_red_block_table")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "runs/reward"}, "reinforce.reward='runs/reward' has no effect with update.method=dpo"),
        ({"group": 1}, "reinforce.group=1: update.method=dpo compares"),
        ({"labels": "x", "update": UpdateConfig()}, "reinforce.labels='x' are for update.method=dpo"),
        ({"pairs": 0}, "pairs=0"),
        (
            {"pairs": 3, "update": UpdateConfig(method="dpo", minibatches=4)},
            "3 pairs at most to learn from .*minibatches=4 and over 1",
        ),
        (
            {"pool": 1, "group": 2, "tables": 32, "devices": 2},
            "pool=1 and group=2 give 1 pairs at most .*over 2 device",
        ),
    ],
)
def test_settings_that_make_no_sense_with_answers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=r"update.method=dpo knows no update.entropy_weight, update.divergence_weight"):
        UpdateConfig(method="dpo", entropy_weight=1.0, divergence_weight=0.1)
    with pytest.raises(ValueError, match=r"update\.beta"):
        UpdateConfig(beta=0.0)


def learner(head: str, patterns: tuple[str, ...], spread: float = 0.1, sizes=(1, 1, 1)) -> direct.DirectPreferences:
    model, params = policy(head)
    (stage,) = stages.plan(TrainConfig(steps=8, trainable=patterns), OptimizerConfig(learning_rate=1e-4))
    mesh = meshes.make_mesh(sizes, jax.devices()[: math.prod(sizes)])
    if mesh.size > 1:
        params = jax.device_put(params, build.abstract_params(model, mesh)[1])
    behaviour = BehaviourConfig(spread=(spread,), floor=1e-4)
    return direct.DirectPreferences(
        model, params, behaviour, UpdateConfig(method="dpo", minibatches=1), stage, mesh, seed=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["lstm", "flow", "discrete", "mlp"])
def test_what_was_drawn_in_a_rollout_is_decided_again_from_its_states(head):
    """With hardly any noise, what was drawn is what the policy decides: only if it sees and remembers the same."""
    own = learner(head, ("^backbone/connector/",) if head == "discrete" else ("^head/",), spread=1e-3)
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 3, seed=0, spread=0.1)
    behaviour = BehaviourConfig(spread=(1e-3,), floor=1e-4)
    how = segments.Trying(behaviour, 2, tuple(SIZES.items()), 2, 7)
    found = segments.roll_out(own.model, own.policy(), encode, trials, how, 0)
    known = own.known(found, encode, playing.Play(tuple(SIZES.items()), 2, 7), 2)
    assert found.decisions(2).tolist() == [4, 4, 4] and len(known.log_prob) == 12
    if head in ("lstm", "mlp"):
        units = -2 * (known.log_prob + np.log(1e-3) + 0.5 * np.log(2 * np.pi))[:, 0, :6]  # squares, mean 1
        assert 0.3 < units.mean() < 3
    assert np.isfinite(known.log_prob).all()
    pieces = direct.Pieces(*np.array([[[0, 1]], [[0, 0]], [[7, 7]]]), np.ones(1))
    compared = direct.Comparisons(pieces, known, found.decisions(2), 2, 21)
    _, first = own.iterate(compared, 0)
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-3)
    assert first["env_steps"] == 21
    _, second = own.iterate(compared, 1)
    assert second["loss"] < first["loss"] and second["preferred"] == 1 and second["env_steps"] == 0
    again, whole = own.learner.reconsider, own.state.params
    assert again(whole, jax.tree.map(jnp.asarray, known.view), known.drawn, 2).log_prob.shape == known.log_prob.shape


@pytest.mark.slow
def test_a_backbone_learns_from_answers_by_the_pictures_of_kept_states():
    own = learner("lstm", ("^head/", "^backbone/connector/"))
    trials = starts.draw(("open_drawer",), ("A",), 2, seed=0, spread=0.1)
    how = segments.Trying(BehaviourConfig(spread=(0.1,), floor=1e-4), 2, tuple(SIZES.items()), 2, 4)
    found = segments.roll_out(own.model, own.policy(), encode, trials, how, 0)
    known = own.known(found, encode, playing.Play(tuple(SIZES.items()), 2, 4), 2)
    assert known.view.seen.images["static"].dtype == np.uint8
    pieces = direct.Pieces(*np.array([[[0, 1]], [[0, 0]], [[4, 4]]]), np.ones(1))
    compared = direct.Comparisons(pieces, known, found.decisions(2), 2, 8)
    _, first = own.iterate(compared, 0)
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-3)
    moved = {path for path, x in own.state.trainable.items() if (np.asarray(x) != own.reference[path]).any()}
    assert any(path.startswith("backbone/connector/") for path in moved)
    assert own.iterate(compared, 1)[1]["loss"] < first["loss"]
