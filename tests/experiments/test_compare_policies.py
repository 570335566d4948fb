"""Policies that differ in one thing: what is trained for each, and the table that comes of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib

import jax
import pytest

from experiments import compare_policies as compare
from experiments import evaluate
from robovlms_jax.runs import cost, load
from robovlms_jax.search import queue, space

Variant = compare.Variant


def test_variants_differ_in_what_they_name_and_in_nothing_else():
    config = compare.PRESETS["chunks"]
    made = [job.config(None) for job in compare.jobs(dataclasses.replace(config, seeds=1))]
    assert [(x.policy.chunk, x.rollouts.execution.horizon) for x in made] == [(1, 1), (5, 5), (10, 5), (20, 5)]
    plain = [
        dataclasses.replace(
            x,
            policy=dataclasses.replace(x.policy, chunk=1),
            rollouts=dataclasses.replace(x.rollouts, execution=made[0].rollouts.execution),
        )
        for x in made
    ]
    assert all(x == plain[0] for x in plain) and plain[0].train.steps == 600


def test_a_variant_begins_where_another_one_of_its_seed_ended(monkeypatch):
    jobs = compare.jobs(dataclasses.replace(compare.PRESETS["cotraining"], seeds=2))
    assert [(job.setting["variant"], job.seed, job.after, job.compared) for job in jobs] == [
        (name, seed, after, after is not None)
        for seed, first in ((0, 0), (1, 4))
        for name, after in (
            ("questions", None),
            ("demonstrations alone", first),
            ("together", first),
            ("insulated", first),
        )
    ]
    first = jobs[0].config(None)
    proprio = dataclasses.replace(first.policy.proprio, center=(0.5,) * 6, scale=(2.0,) * 6)
    policy = dataclasses.replace(first.policy, proprio=proprio, action_mu=3.0, chunk=7)
    monkeypatch.setattr(load, "load_config", lambda run: dataclasses.replace(first, policy=policy))
    later = jobs[5].config(pathlib.Path("runs/x"))
    assert (later.policy.proprio, later.policy.action_mu, later.policy.chunk) == (proprio, 3.0, 5)  # scales alone
    assert first.rollouts.trials == 0 and first.train.stages[0].steps == 1500
    assert (later.train.init_from, later.train.seed, later.train.steps) == ("runs/x", 1, 600)
    assert later.data.vl.paths and not later.train.stages


def test_questions_come_beside_as_many_demonstrations_as_the_policy_without_them_has():
    config = compare.PRESETS["cotraining"]
    alone, *beside = [compare._start(config, variant) for variant in config.variants[1:]]
    for x in beside:
        share = x.train.sources["robot"] / sum(x.train.sources.values())
        assert x.train.batch_size * share == alone.train.batch_size and x.data.vl.paths
    assert not alone.train.sources and [x.policy.insulate for x in beside] == [False, True]


def test_orders_of_stages_are_compared_at_equal_numbers_of_steps():
    config = compare.PRESETS["stages"]
    made = [compare._start(config, variant).train.stages for variant in config.variants]
    assert [[stage.name for stage in stages] for stages in made] == [
        ["vl", "robot", "cross-embodiment"],
        ["vl", "cross-embodiment", "robot"],
    ]
    assert {tuple(stage.steps for stage in stages) for stages in made} == {(300, 600, 600)}


def test_unseen_wordings_are_asked_of_the_same_trials_and_kept_out_of_the_runs_own_results(tmp_path, monkeypatch):
    config, asked = compare.PRESETS["words"], []
    started = compare._start(config, config.variants[1])
    monkeypatch.setattr(load, "load_config", lambda run: started)

    def evaluated(settings):
        asked.append(settings)
        return pathlib.Path(settings.out) / "x" / "rollouts.md"

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(compare.protocol, "success", lambda folder: {"value": 0.25, "folder": folder})
    found = compare._asked(tmp_path / "run", started.rollouts, held_out=True)
    ours = asked[0]
    assert found == {"value": 0.25, "folder": pathlib.Path(ours.out) / "x"} and started.data.vary_language
    assert pathlib.Path(ours.out).parent == tmp_path  # and not the run
    assert ours.held_out and (ours.chains, ours.tasks) == (80, started.rollouts.tasks)
    assert (ours.scene, ours.max_steps, ours.execution) == ("D", 80, started.rollouts.execution)
    others = dataclasses.replace(started.rollouts, tasks=("open_drawer",), scene="A", tables=4, image_size=(96, 64))
    compare._asked(tmp_path / "run", others)
    again = asked[1]
    assert (again.scene, again.tasks, again.processes, again.image_size) == ("A", ("open_drawer",), 4, (96, 64))
    assert again.out != ours.out


def test_what_is_executed_of_a_chunk_is_asked_of_one_policy_and_trains_none_of_its_own(monkeypatch):
    jobs = compare.jobs(dataclasses.replace(compare.PRESETS["execution"], seeds=1))
    assert [(job.setting["variant"], job.after, job.config is None) for job in jobs] == [
        ("5 of 5", None, False),
        ("1 of 5", 0, True),
    ]
    asked = []
    monkeypatch.setattr(compare, "_asked", lambda run, rollouts: asked.append((run, rollouts)) or {"value": 1.0})
    monkeypatch.setattr(compare.json_files, "read_object", lambda *_: {})
    monkeypatch.setattr(compare, "_answers", lambda run: None)
    assert jobs[1].judge(pathlib.Path("x"))["value"] == 1.0
    ((run, rollouts),) = asked
    assert run == pathlib.Path("x") and (rollouts.execution.horizon, rollouts.trials) == (1, 80)
    with pytest.raises(ValueError, match=r"variant 'y' is asked.* sets nothing but rollouts.*\['train.steps=5'\]"):
        Variant("y", ("train.steps=5",), after="x", asked=True)
    with pytest.raises(ValueError, match="'y' trains nothing to begin with"):
        compare.ComparePoliciesConfig((Variant("x"), Variant("y", after="x", asked=True), Variant("z", after="y")))


def test_a_variant_that_its_run_would_refuse_is_named_before_the_first_is_trained():
    variants = (Variant("fine"), Variant("odd", ("data.windows_per_segment=3",)))
    with pytest.raises(ValueError, match=r"compare.variants, 'odd': .*no multiple of data.windows_per_segment=3"):
        compare.jobs(compare.ComparePoliciesConfig(variants))


def test_a_variants_demonstrations_are_drawn_anew_for_every_seed(tmp_path, monkeypatch):
    spans = {"open_drawer": [(n, n + 9) for n in range(0, 90, 10)]}
    monkeypatch.setattr(compare.protocols, "demonstrations", lambda start: spans)
    config = compare.ComparePoliciesConfig((Variant("few", demonstrations=2),), seeds=2, out=str(tmp_path))
    lists = [job.config(None).data.episode_list for job in compare.jobs(config)]
    drawn = [json.loads(pathlib.Path(path).read_text())["open_drawer"] for path in lists]
    assert drawn[0] != drawn[1] and all(len(x) == 2 for x in drawn)


def test_what_counts_more_is_set_last():
    config = compare.ComparePoliciesConfig((Variant("a", ("train.steps=5",)),), fixed=("train.steps=4",))
    assert compare.jobs(config)[0].config(None).train.steps == 5
    more = dataclasses.replace(config, more=("train.steps=6",))
    assert compare.jobs(more)[0].config(None).train.steps == 6


def test_the_compared_words_differ_in_bins_ids_decoding_and_rate():
    config = compare.PRESETS["discrete"]
    starts = [compare._start(config, variant) for variant in config.variants]
    found = [
        (x.policy.head.num_bins, x.policy.head.vocab_end, x.policy.head.decoding, x.optimizer.learning_rate)
        for x in starts
    ]
    one_by_one, parallel = "autoregressive", "parallel"
    assert found[:3] == [(bins, 0, one_by_one, 4e-4) for bins in (256, 64, 32)]
    assert found[3:6] == [(64, 512, one_by_one, 4e-4), (64, 0, parallel, 4e-4), (64, 0, one_by_one, 2e-3)]
    assert found[6:] == [(bins, 0, parallel, 2e-3) for bins in (256, 64, 32)]


def test_the_ways_to_teach_new_tasks_are_what_they_are_called():
    config = compare.PRESETS["training"]
    variants = {variant.name: variant for variant in config.variants}
    assert {variant.after for variant in config.variants if variant.compared} == {"six tasks"}

    def made(name):
        return compare._start(config, variants[name])

    layer, plus, eight = map(made, ("language model's last layer, head", "LoRA+", "LoRA beside eight bits"))
    assert layer.optimizer.last_layers == {"^backbone/text/": 1} and not any(
        "vision" in x for x in layer.train.trainable
    )
    assert plus.optimizer.rates == {"lora_b$": 16} and plus.backbone.lora_rank and "^head/" in plus.train.trainable
    assert eight.backbone.storage == "int8" and eight.train.trainable == plus.train.trainable
    stages = made("head first, then the language model, then all").train.stages
    assert [len(stage.trainable) for stage in stages] == [2, 3, 1] and stages[2].trainable == (".*",)
    old = set(eight.data.exclude_tasks)
    assert old.isdisjoint(eight.rollouts.tasks) and old | set(eight.rollouts.tasks) == set(eight.demonstrations.tasks)
    assert made("six tasks").data.exclude_tasks == eight.rollouts.tasks


def test_answers_are_those_of_the_last_validation(tmp_path):
    assert compare._answers(tmp_path) is None
    rows = [{"step": step, "validation/accuracy_questions": share} for step, share in ((1, 0.2), (5, 0.75))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare._answers(tmp_path) == 0.75


def test_every_variant_sets_fields_that_there_are():
    """Their values: the slow test below."""
    for config in compare.PRESETS.values():
        presets = importlib.import_module(f"experiments.{config.experiment}").PRESETS
        for variant in config.variants:
            start = presets[variant.start or config.start]
            for name in space.fixed((*config.fixed, *variant.fixed)):
                *parts, last = name.split(".")
                inside = functools.reduce(
                    lambda x, part: x[int(part)] if part.isdigit() else getattr(x, part), parts, start
                )
                assert hasattr(inside, last), f"{variant.name}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", compare.PRESETS)
def test_every_variant_of_every_comparison_is_a_configuration(name):
    config = compare.PRESETS[name]
    assert len(compare.jobs(config)) == config.seeds * len(config.variants)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ()}, "variants is empty"),
        ({"variants": (Variant("a"), Variant("a"))}, r"has \['a'\] more than once"),
        ({"variants": (Variant("a", after="b"), Variant("b"))}, r"'a' begins with 'b', which is none of .*: \[\]"),
        ({"variants": (Variant("a", compared=False),)}, "none that is compared"),
        ({"variants": (Variant("a"),), "seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        compare.ComparePoliciesConfig(**settings)


def test_a_variant_without_rollouts_is_named_before_anything_runs():
    config = compare.ComparePoliciesConfig((Variant("a", ("rollouts.trials=0",)),))
    with pytest.raises(ValueError, match="'a' has no rollouts to be compared by"):
        compare.jobs(config)


def test_the_table_has_means_over_seeds_and_what_a_control_step_costs(tmp_path):
    config = compare.ComparePoliciesConfig((Variant("a"), Variant("b")), seeds=2, out=str(tmp_path))
    jobs = compare.jobs(config)
    values, trials = [0.5, 0.25, 0.75, 0.25], []
    for number, job in enumerate(jobs):
        result = {"value": values[number], "trials": 4, "tasks": {"open_drawer": values[number]}, "error_mm": 3.0}
        if job.seed == 0:
            result |= {"milliseconds": 2.0, "parameters": 10, "head_parameters": 4, "step_bytes": 2**20}
        folder = queue.folder(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        trials.append(queue.Trial(number, dict(job.setting), job.seed, "done", values[number]))
    text = compare.write_report(config, trials).read_text()
    assert "| a | 2 | 0.62 ± 1.59 | 3.0 ± 0.0 | 2.0 | 1.0 | 4 |" in text
    assert "answers right" not in text  # of a comparison that asks none
    row = json.loads((tmp_path / "policies.json").read_text())["rows"][1]
    assert row["success"] == [0.25, 0.25] and row["half_width"] == 0 and row["tasks"] == {"open_drawer": 0.25}


def test_answers_before_are_those_of_the_policy_that_was_begun_with(tmp_path):
    asking = (Variant("questions", compared=False), Variant("alone", after="questions"))
    config = compare.ComparePoliciesConfig(asking, seeds=2, unseen=True, out=str(tmp_path))
    trials = []
    for number, answers in enumerate((0.5, 0.25, 0.75, 0.375)):
        result = {"value": 0.5, "trials": 4, "tasks": {}, "unseen": 0.25, "answers": answers}
        folder = queue.folder(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        trials.append(queue.Trial(number, {"variant": asking[number % 2].name}, number // 2, "done", 0.5))
    (row,) = compare.rows_of(config, trials)
    assert (row["answers_before"], row["answers"], row["unseen"]) == ([0.5, 0.75], [0.25, 0.375], [0.25, 0.25])
    assert "| unseen wordings | answers right before | answers right |" in compare._table([row])


@pytest.mark.slow
def test_a_control_step_of_the_bundled_twin_is_measured():
    twin = pathlib.Path(compare.__file__).parents[1] / "robovlms_jax" / "demo" / "twin"
    policy = load.load_batched_policy(twin, 1)
    found, count = cost.measure(policy, (96, 64), steps=3), sum(x.size for x in jax.tree.leaves(policy.params))
    assert found["parameters"] == count and 0 < found["head_parameters"] < count
    assert found["step_bytes"] > 4 * count and found["milliseconds"] > 0
