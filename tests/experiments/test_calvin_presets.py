"""Presets of the main job: what they say, which of them begins with another, which one is chosen."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import bridge, calvin_abcd
from robovlms_jax.load import load_config


def test_presets_are_what_the_table_says():
    for name, config in calvin_abcd.PRESETS.items():
        config.validate(1)
        assert dataclasses.replace(config).train.output == f"runs/{name}"
    released, paper = calvin_abcd.PRESETS["kosmos_lstm"].optimizer, calvin_abcd.PRESETS["kosmos_lstm_paper"].optimizer
    assert (released.learning_rate, released.weight_decay) == (2e-5, 0.0)
    assert (paper.learning_rate, paper.weight_decay) == (1e-4, 0.01)


def test_the_presets_for_the_real_simulator_begin_with_playtables_policies_and_never_see_its_table_d():
    presets = calvin_abcd.PRESETS
    playtable, calvin = presets["playtable_small"], presets["calvin_small"]
    assert (
        load_config(playtable.train.init_from).policy.readout == playtable.policy.readout
    )  # the bundled twin is there
    assert calvin.train.init_from == playtable.train.output
    assert playtable.policy == calvin.policy == presets["playtable_fixtures"].policy  # so that parameters fit
    assert playtable.demonstrations.tasks == playtable.rollouts.tasks == ()  # all 34, rolled out as chains
    assert "D" not in playtable.demonstrations.scenes
    for config in (presets["calvin_fixtures_cpu"], calvin):
        assert set(config.train.sources) == {"robot", *config.data.further.names}
        assert not config.demonstrations.episodes and not config.rollouts.trials  # `record_calvin` and `evaluate` do it
    roots = calvin.data.further.roots
    assert roots["fixtures"] == presets["calvin_fixtures_cpu"].data.root
    assert roots["playtable"] == playtable.data.root
    shares = calvin.train.sources
    assert shares["playtable"] == sum(shares.values()) / 2  # half of every batch


def test_what_was_seen_of_table_d_differs_in_data_alone_and_takes_a_quarter_of_what_the_real_simulator_gives():
    without, shown = (calvin_abcd.PRESETS[name] for name in ("calvin_small", "calvin_small_abcd"))
    further = dataclasses.replace(shown.data, further=without.data.further)
    same = {name: getattr(without.train, name) for name in ("sources", "source_weights", "output")}
    train = dataclasses.replace(shown.train, **same)
    assert dataclasses.replace(shown, data=further, train=train) == without
    shares = shown.train.sources
    assert set(shares) == {"robot", *shown.data.further.names}
    of_d = {source.removeprefix("d_"): source for source in shares if source.startswith("d")}
    for source in ("robot", "blocks", "fixtures"):  # the mixture of one recording on four tables
        other, weights = of_d["d" if source == "robot" else source], shown.train.source_weights
        assert shares[source] == 3 * shares[other]
        assert weights[source] == 3 * weights[other] and weights[source] + weights[other] == 1
    assert shares["playtable"] == sum(shares.values()) / 2


@pytest.mark.parametrize("name", ["calvin_seen", "calvin_unseen"])
def test_what_is_taught_where_things_lie_begins_with_the_twin_and_counts_each_row_alike(name):
    seen, fixtures = calvin_abcd.PRESETS[name], calvin_abcd.PRESETS["playtable_fixtures"]
    plain = dataclasses.replace(seen.policy, auxiliary=fixtures.policy.auxiliary)
    assert plain == fixtures.policy and load_config(seen.train.init_from).policy.readout == plain.readout
    assert set(seen.train.sources) == {"robot", *seen.data.further.names}
    assert dict(seen.train.sources) == dict(seen.train.source_weights)
    assert seen.data.paraphrases == f"{seen.data.root}/paraphrases.json" and seen.data.vary_language
    assert seen.data.skip_still > 0


def test_what_has_not_seen_table_d_differs_in_data_and_colours_alone():
    seen, unseen = (calvin_abcd.PRESETS[name] for name in ("calvin_seen", "calvin_unseen"))
    own = {name: getattr(seen.data, name) for name in ("root", "further", "paraphrases", "augment")}
    same = {name: getattr(seen.train, name) for name in ("sources", "source_weights", "output")}
    train = dataclasses.replace(unseen.train, **same)
    assert dataclasses.replace(unseen, data=dataclasses.replace(unseen.data, **own), train=train) == seen
    shares, before = unseen.train.sources, seen.train.sources
    real = shares["robot"] + shares["fixtures"]
    assert shares["robot"] / real == pytest.approx(before["robot"]) and shares["playtable"] == pytest.approx(1 - real)


def test_the_larger_policy_sees_the_real_simulator_and_playtable_in_pictures_of_the_same_size():
    full, larger = calvin_abcd.PRESETS["playtable_full"], calvin_abcd.PRESETS["calvin_full"]
    assert (larger.policy, larger.backbone, larger.optimizer) == (full.policy, full.backbone, full.optimizer)
    assert larger.train.sources == {"robot": 1.0, "playtable": 1.0}  # half of every batch
    assert set(larger.train.sources) == {"robot", *larger.data.further.names}
    # Whichever has more demonstrations, what is asked in the end counts most.
    assert larger.train.source_weights == {"playtable": 0.5}
    assert larger.data.augment == calvin_abcd.PRESETS["calvin_small"].data.augment != full.data.augment
    assert not larger.demonstrations.episodes and not larger.rollouts.trials  # `record_calvin` and `evaluate` do it


def test_own_data_alone_are_asked_for_a_preset_and_own_weights_mean_the_real_one():
    assert calvin_abcd.default_preset([]) == "playtable_fixtures"
    assert calvin_abcd.default_preset(["--train.steps", "3"]) == "playtable_fixtures"
    assert calvin_abcd.default_preset(["--data.root", "x", "--help"]) == "playtable_fixtures"
    assert calvin_abcd.default_preset(["--data.root", "x", "--backbone.weights", "y"]) == "kosmos_lstm"
    for choose in (calvin_abcd.default_preset, bridge.default_preset):  # never 1.7 billion random numbers
        with pytest.raises(SystemExit, match=r"--preset sample .*or --preset kosmos_lstm with --backbone\.weights"):
            choose(["--data.root", "x"])
    assert calvin_abcd.default_preset(["--backbone.weights=x"]) == "kosmos_lstm"
