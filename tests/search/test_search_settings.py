"""What a trial's run would refuse is refused by the search, before the first trial."""

from __future__ import annotations

import pytest

from experiments import calvin_abcd, search_settings
from robovlms_jax import cli, schema
from robovlms_jax.runs import measured
from robovlms_jax.search import space
from robovlms_jax.search.config import SearchConfig

SAMPLE = calvin_abcd.PRESETS["sample"]


def looked_at(search: SearchConfig | None = None, devices: int | None = 1, **changes) -> None:
    """What is said of one trial; reading it from a command line is most of what a whole search takes."""
    search_settings._require(search or SearchConfig(), cli.override(SAMPLE, **changes), devices, [])


def test_what_its_run_refuses_is_named_with_the_setting_and_so_is_an_end_of_a_range():
    asked = SearchConfig(start="sample", space=("train.accumulation=1:3:int",), sampler="random", trials=1)
    with pytest.raises(ValueError, match=r"^a trial with train.accumulation=3: .*does not divide"):
        search_settings.require(asked, lambda: 1)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (SearchConfig(), "search.space is empty: name at least one field"),
        (SearchConfig(space=("train.steps=1:9",)), "a grid needs values"),
        (SearchConfig(start="smaple", space=("train.steps=1",)), "did you mean 'sample'"),
        (
            SearchConfig(experiment="search", start="grid", space=("train.steps=1",)),
            "'search' trains no policy",
        ),
        (SearchConfig(space=("train.steps=1",), objective="rollouts/score"), "pass --direction maximize"),
        (SearchConfig(space=("train.steps=1",), out=""), "--out is empty"),
        (SearchConfig(space=("train.steps=1",), out=__file__), "is a file; choose another directory"),
        (SearchConfig(space=("train.batch-size=1,2",), fixed=("train.batch_size=4",)), "a field does one"),
    ],
)
def test_what_is_wrong_with_the_search_itself_is_said_before_devices_are_counted(search, said):
    def never():
        raise AssertionError("counted")

    with pytest.raises(ValueError, match=said):
        search_settings.require(search, never)


def test_values_that_a_command_line_refuses_together_are_told_with_the_setting(capsys):
    fields = ("policy.window=4", "policy.history=one_step")
    with pytest.raises(SystemExit):
        search_settings.require(SearchConfig(start="sample", space=fields), lambda: 1)
    said = capsys.readouterr().err
    assert "history=one_step" in said and "this is a trial with policy.window=4, policy.history=one_step" in said


def test_a_batch_is_divided_over_the_devices_of_a_trial_where_they_are_known():
    looked_at(devices=None, **{"train.batch_size": 40})
    with pytest.raises(ValueError, match=r"train.batch_size=40.* over 4 data-parallel devices"):
        looked_at(devices=4, **{"train.batch_size": 40})


def test_data_that_are_not_there_are_named_unless_the_run_records_them(monkeypatch):
    with pytest.raises(ValueError, match=r"'/nowhere': .*does not exist"):
        looked_at(**{"data.root": "/nowhere"})
    recorded = cli.override(calvin_abcd.FIXTURES, **{"data.root": "/nowhere"})
    search_settings._require(SearchConfig(), recorded, 1, [])
    opened: list = []
    monkeypatch.setattr(search_settings.opening, "open_split", lambda data, split: opened.append(data.root))
    looked_at_before: list = []
    for area in (0.0, 0.9):  # what is done to pictures opens nothing else
        config = cli.override(SAMPLE, **{"data.augment.crop_area": area})
        search_settings._require(SearchConfig(), config, 1, looked_at_before)
    assert opened == [SAMPLE.data.root]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("validaton/loss", "did you mean 'validation/loss'?"),
        ("train/token_accuracy", "It writes train/loss, "),
        ("rollouts/score", "rollouts.select=best"),
    ],
)
def test_an_objective_that_no_run_writes_is_named_before_the_first(objective, said):
    with pytest.raises(ValueError, match=r"search\.objective=") as caught:
        looked_at(SearchConfig(objective=objective))
    assert said in str(caught.value)


def test_pruning_with_nothing_to_compare_with_is_refused():
    with pytest.raises(ValueError, match=r"search\.prune has no effect with search\.trials=1: .*Raise --trials"):
        SearchConfig(sampler="random", trials=1, prune=True)


def test_pruning_by_what_is_written_at_the_end_alone_is_refused():
    asked = SearchConfig(sampler="random", trials=2, prune=True)
    with pytest.raises(ValueError, match=r"search.prune .* at their end alone; set train.eval_every"):
        looked_at(asked, **{"train.eval_every": 0})
    looked_at(asked)


def test_configurations_put_together_are_those_that_a_command_line_gives(monkeypatch):
    fixed, fields = {"train.epochs": "2"}, space.read(("train.steps=10", "policy.head=gpt"))
    with monkeypatch.context() as patched:
        read = cli.read
        patched.setattr(cli, "read", lambda start, argv: None if len(argv) > 4 else read(start, argv=argv))
        ((setting, found),) = search_settings.configurations(SAMPLE, fixed, fields)
    assert setting == {"train.steps": "10", "policy.head": "gpt"} and found.train.epochs == 2
    assert schema.to_dict(found) == schema.to_dict(cli.read(SAMPLE, argv=space.flags(fixed | setting)))


def test_rollouts_are_measured_where_something_asks_for_them_before_the_report():
    whole = calvin_abcd.FIXTURES
    steps = whole.train.steps
    for changes, said in (({}, False), ({"every": steps}, False), ({"every": 10}, True), ({"select": "best"}, True)):
        config = cli.override(whole, **{f"rollouts.{name}": value for name, value in changes.items()})
        assert measured.rolls_out(config) == said == ("rollouts/score" in measured.names(config))


def test_devices_are_unknown_where_they_cannot_be_counted(monkeypatch):
    monkeypatch.setattr(search_settings.sys, "executable", "/bin/echo")
    assert search_settings.devices() is None
