"""What programs that play a checkpoint know of it, so that nobody has to say it again."""

from __future__ import annotations

import dataclasses
import types

import pytest

from experiments import calvin_abcd, evaluation_settings, serve, teach
from robovlms_jax import cli
from robovlms_jax.control import robot
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.retrying import Retry
from robovlms_jax.evaluation.config import RolloutConfig
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.rl import config as rl_config
from robovlms_jax.runs import correcting, load, played, reinforcing, trying
from robovlms_jax.runs.config import ExperimentConfig

SHOWN = DemonstrationConfig(
    episodes=10,
    tasks=("open_drawer",),
    scenes=("A", "random-3"),
    validation_scene="B",
    max_steps=90,
    image_size=(64, 48),
)
ASKED = RolloutConfig(
    trials=4, tasks=("turn_on_led",), scene="C", max_steps=70, image_size=(80, 40), execution=Execution("receding", 3)
)


def test_a_runs_own_rollouts_say_it_then_its_demonstrations_then_calvin():
    both = played.of(ExperimentConfig(demonstrations=SHOWN, rollouts=ASKED))
    assert (both.tasks, both.unseen_scene, both.max_steps, both.image_size) == (("turn_on_led",), "C", 70, (80, 40))
    assert both.scenes == ("A", "random-3") and both.execution == ASKED.execution and both.horizon == 3
    shown = played.of(ExperimentConfig(demonstrations=SHOWN))
    assert (shown.tasks, shown.unseen_scene, shown.max_steps, shown.image_size) == (("open_drawer",), "B", 90, (64, 48))
    usual = played.of(ExperimentConfig())
    assert (usual.asked, usual.tasks, usual.image_size) == ((), (), (200, 84))
    chains = played.of(ExperimentConfig(demonstrations=SHOWN, rollouts=dataclasses.replace(ASKED, tasks=())))
    assert chains.asked == () and chains.tasks == ("open_drawer",)  # chains stay chains, and something was learned


def test_what_a_checkpoint_knows_is_taken_from_it_unless_it_is_given(monkeypatch, tmp_path, caplog):
    experiment = ExperimentConfig(demonstrations=SHOWN, rollouts=ASKED)
    caplog.set_level("INFO")
    tried = trying.resolved(trying.TryingConfig(max_steps=20), experiment)
    assert (tried.tasks, tried.scenes, tried.image_size) == (("turn_on_led",), ("A", "random-3"), (80, 40))
    assert tried.horizon == 3 and tried.max_steps == 20
    assert "horizon 3" in caplog.text and "max_steps" not in caplog.text
    monkeypatch.setattr(reinforcing.checkpoints, "locate", lambda path: path)
    learned = reinforcing._resolved(rl_config.ReinforceConfig(checkpoint="x", scenes=("B",)), experiment)
    assert (learned.unseen_scene, learned.scenes, learned.image_size, learned.horizon) == ("C", ("B",), (80, 40), 3)
    taught = teach.resolved(teach.TeachConfig(scenes=("B",)), experiment)
    assert (taught.tasks, taught.scenes, taught.max_steps) == (("turn_on_led",), ("B",), 70)
    with pytest.raises(ValueError, match=r"tasks is empty"):
        teach.resolved(teach.TeachConfig(), ExperimentConfig())
    with pytest.raises(ValueError, match=r"record\.tasks is empty"):
        trying.resolved(trying.TryingConfig(), ExperimentConfig())


def test_corrections_are_begun_and_gone_on_with_by_what_the_checkpoint_knows(monkeypatch, tmp_path):
    """What is written down is what was taken: a checkpoint that was trained on says nothing new about it."""
    found = {}

    def stop(where, settings, sentences):
        found.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(load, "load_config", lambda path: ExperimentConfig(demonstrations=SHOWN, rollouts=ASKED))
    monkeypatch.setattr(correcting.checkpoints, "locate", lambda path: tmp_path)
    monkeypatch.setattr(correcting.seals, "identity", lambda directory: types.SimpleNamespace(label="step_1-abc"))
    monkeypatch.setattr(correcting.splits, "Journal", stop)
    with pytest.raises(ValueError, match="enough"):
        correcting.record(correcting.CorrectionConfig(checkpoint="run", out=str(tmp_path / "out")))
    assert found["max_steps"] == 70 and found["record"]["image_size"] == [80, 40] and found["record"]["horizon"] == 3


def test_rollouts_with_other_pictures_than_the_demonstrations_are_refused():
    preset = calvin_abcd.PRESETS["playtable_fixtures"]
    preset.validate(1)
    other = dataclasses.replace(preset, demonstrations=dataclasses.replace(preset.demonstrations, image_size=(64, 48)))
    with pytest.raises(ValueError, match=r"rollouts.image_size=\(96, 64\) is not demonstrations.image_size=\(64, 48\)"):
        other.validate(1)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"policy.window": 4}, r"set policy\.window=1"),
        ({"data.windows_per_segment": 8}, r"set data\.windows_per_segment=1"),
        ({"policy.auxiliary.forward.loss_weight": 0.1}, r"policy\.auxiliary\.forward predicts"),
    ],
)
def test_demonstrations_with_too_few_pictures_are_refused_before_they_are_recorded(change, advice):
    preset = cli.override(calvin_abcd.PRESETS["playtable_fixtures"], **{"demonstrations.picture_every": 3})
    preset.validate(1)
    with pytest.raises(ValueError, match=rf"demonstrations\.picture_every=3: .*{advice}"):
        cli.override(preset, **change).validate(1)


def test_rollouts_that_cannot_move_the_robots_hand_are_refused_before_training():
    again = Execution("chunk", retry=Retry(after=90))
    preset = calvin_abcd.PRESETS["playtable_fixtures"]
    rollouts = dataclasses.replace(preset.rollouts, execution=again)
    dataclasses.replace(preset, rollouts=rollouts).validate(1)
    nameless = dataclasses.replace(
        preset.policy, robot=robot.end_effector("nameless", "ticks", state=robot.CALVIN.state)
    )
    with pytest.raises(ValueError, match="dimension 'x' has unit 'ticks'"):
        dataclasses.replace(preset, rollouts=rollouts, policy=nameless).validate(1)
    asked = dataclasses.replace(rollouts, trials=0)
    dataclasses.replace(preset, rollouts=asked, policy=nameless).validate(1)  # nothing is rolled out


def test_who_does_not_try_again_as_the_runs_own_rollouts_did_says_so(monkeypatch, caplog):
    again = Execution("receding", 3, retry=Retry(after=90))
    own = ExperimentConfig(demonstrations=SHOWN, rollouts=dataclasses.replace(ASKED, execution=again))
    said = "the run's own rollouts were receding 3, retry after 90; here nothing is tried again"
    monkeypatch.setattr(load, "load_config", lambda checkpoint: own)
    for play in (
        lambda: trying.resolved(trying.TryingConfig(), own),
        lambda: serve.executed_of_a_chunk(serve.ServeConfig("x"), own),
        lambda: evaluation_settings.of_checkpoint(["--checkpoint", "x", "--latency_ms", "50"]),
    ):
        caplog.clear()
        play()
        assert said in caplog.text
    caplog.clear()
    assert evaluation_settings.of_checkpoint(["--checkpoint", "x"]).execution == again
    own = ExperimentConfig(demonstrations=SHOWN, rollouts=ASKED)
    serve.executed_of_a_chunk(serve.ServeConfig("x"), own)
    assert said[:20] not in caplog.text


def test_vla_evals_clients_are_given_as_many_actions_as_the_runs_own_rollouts_executed():
    asked = ExperimentConfig(rollouts=ASKED)
    assert serve.executed_of_a_chunk(serve.ServeConfig("x"), asked) == 3
    assert serve.executed_of_a_chunk(serve.ServeConfig("x", executed=2), asked) == 2
    assert serve.executed_of_a_chunk(serve.ServeConfig("x"), ExperimentConfig()) == 1


def test_so_many_actions_are_executed_of_a_chunk_before_there_is_another():
    modes = {"first": 1, "ensemble": 1, "chunk": 10, "receding": 4}
    assert {mode: Execution(mode, 4).executed(10) for mode in modes} == modes
    assert Execution("receding", 20).executed(10) == 10
