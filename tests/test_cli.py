"""Command lines: how switches may be spelled, and what is said about values that do not fit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from robovlms_jax import cli, cli_help, schema
from robovlms_jax.control import robot
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads import flow
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class Room:
    left_pad: bool = False
    success_only: bool = True
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings:
    """A program's settings."""

    steps: int = 1
    full_size: bool = False
    data: Room = Room()


@pytest.mark.parametrize("as_instance", [True, False])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--data.success_only", True),
        ("--data.success-only", True),
        ("--data.success_only True", True),
        ("--data.success-only=yes", True),
        ("--data.success_only FALSE", False),
        ("--data.success_only=0", False),
        ("--no-data.success_only", False),
        ("--no_data.success-only", False),
        ("--data.no-success_only", False),
        ("--data.no_success_only", False),
        ("--no-data.success_only False", True),
        ("--data.success_only --data.no-success-only", False),
    ],
)
def test_a_switch_is_understood_in_every_usual_spelling(arguments, expected, as_instance):
    # Between other flags, of which one takes any number of words, and for a switch that has no room of its own.
    argv = ["--data.names", "a", "no", *arguments.split(), "--full-size", "true", "--steps", "3"]
    settings = cli.read(Settings() if as_instance else Settings, argv=argv)
    assert settings == Settings(3, full_size=True, data=Room(success_only=expected, names=("a", "no")))


@pytest.mark.parametrize(
    ("arguments", "expected", "is_told"),
    [
        ("--backbone.remat --train.steps 3", "dots", True),
        ("--backbone.remat=True", "dots", True),
        ("--backbone.no-remat", "none", True),
        ("--backbone.remat false", "none", True),
        ("--backbone.remat offload", "offload", False),
        ("--backbone.remat=full", "full", False),
    ],
)
def test_what_was_a_switch_once_is_understood_and_answered_with_what_it_is_today(arguments, expected, is_told, capsys):
    config = cli.read(ExperimentConfig(), argv=arguments.split())
    assert config.backbone.remat == expected
    assert (f"taken as --backbone.remat {expected}." in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(("was", "today"), [(True, "dots"), (False, "none")])
def test_a_configuration_from_before_is_read_as_it_was_meant(was, today):
    saved = to_dict(ExperimentConfig())
    saved["backbone"]["remat"] = was
    assert from_dict(ExperimentConfig, saved).backbone.remat == today
    assert cli.override(ExperimentConfig(), **{"backbone.remat": was}).backbone.remat == today


def test_a_field_that_was_a_switch_says_what_it_takes():
    with pytest.raises(ValueError, match=r"backbone.remat='dot' is not one of 'none', 'dots', 'offload', 'full'"):
        cli.override(ExperimentConfig(), **{"backbone.remat": "dot"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.success_only", "maybe"], "--data.success_only is a switch: expected nothing after it, or True or"),
        (["--no-full_size="], "--no-full_size is a switch"),
        (["--data.success_onlly"], "--data.success_only"),
        (["--no-steps"], "--steps"),
        (["--steps", "abc"], "--steps"),
    ],
)
def test_a_wrong_command_line_ends_with_a_message_that_names_the_flag(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.read(Settings, argv=arguments)
    assert end.value.code == 2
    out = capsys.readouterr()
    assert message in out.out + out.err


@dataclasses.dataclass(frozen=True)
class Written:
    """A program that writes something."""

    out: str = ""


def test_results_go_to_out_in_every_program_and_old_names_are_answered_with_it(capsys):
    assert cli.read(Written, argv=["--out", "a"]).out == "a" and not capsys.readouterr().err
    for old in ("--output", "--to"):
        assert cli.read(Written, argv=[old, "a"]).out == cli.read(Written, argv=[f"{old}=a"]).out == "a"
        assert f"{old} is called --out now" in capsys.readouterr().err
    for name in ("--out", "--output", "--train.output"):
        assert cli.read(ExperimentConfig(), argv=[name, "a"]).train.output == "a"


def test_every_example_of_a_description_stands_on_a_line_of_its_own():
    text = "What it does.   python -m x --a 1\n\npython -m y --b   # why\npython -m z \\\n    --c\n\nMore."
    apart = cli_help.with_examples_apart(text).splitlines()
    assert apart[:2] == ["What it does.", "    python -m x --a 1"]
    assert apart[3:6] == ["    python -m y --b   # why", "    python -m z \\", "        --c"] and apart[-1] == "More."


def test_a_comment_of_an_example_is_never_broken_by_a_backslash_and_no_example_is_cut_in_two():
    long = "python -m x --alpha 1 --beta 2   # what it is for, in many words that do not fit beside it, nor below"
    text = f"What.\n\n{long}\npython -m y   # short\n" + "python -m z --name value --other value --third value\n" * 9
    with_width = cli_help._shown_examples(cli_help.with_examples_apart(text).splitlines()[2:], 72)
    assert with_width[:3] == [
        "  # what it is for, in many words that do not fit beside it, nor below",
        "  python -m x --alpha 1 --beta 2",
        "  python -m y   # short",
    ]
    assert not with_width[-1].endswith("\\") and len(with_width) <= 8
    broken = cli_help._shown_examples(["    python -m x " + "--name value " * 9], 72)
    assert [line.endswith(" \\") for line in broken] == [True, False]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sampel"], "'sampel' belongs to no flag; did you mean '--preset sample'?"),
        (["--hepl"], "--hepl is no flag of this program; did you mean --help?"),
        (["--hepl-all"], "did you mean --help-all?"),
    ],
)
def test_what_is_typed_without_its_flag_or_for_help_is_answered(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse({"sample": ExperimentConfig(), "other": ExperimentConfig()}, "other", description="x", argv=argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_short_spellings_take_values_and_dashes():
    presets = {"small": ExperimentConfig()}

    def train(*argv):
        return cli.parse(presets, "small", description="", argv=argv)[1].train

    assert train("--resume=True", "--init-from=runs/a").init_from == "runs/a"
    assert train("--resume").resume and not train("--resume", "--no-resume").resume


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("policy.window", "abc", r"policy\.window='abc' is a str; expected int"),
        ("policy.window", 2.5, r"policy\.window=2\.5 is a float; expected int"),
        ("train.steps", True, r"train\.steps=True is a bool; expected int"),
        ("policy.cameras", "static", r"policy\.cameras='static' is a str; expected tuple"),
        ("policy.history", "prost", r"policy\.history='prost' is not one of 'one_step', 'interleaved'"),
        ("policy.head", "lstm", r"policy\.head='lstm' is a str; expected HeadConfig"),
        ("policy.windw", 3, r"policy has no field 'windw'; did you mean 'window'"),
        ("polcy.window", 3, r"ExperimentConfig has no field 'polcy'; did you mean 'policy'"),
        ("policy.window.size", 3, r"policy\.window=8 has no fields"),
    ],
)
def test_an_override_that_does_not_fit_its_field_is_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        cli.override(ExperimentConfig(), **{path: value})


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match=r"policy\.window='abc' is a str; expected int"):
        PolicyConfig(window="abc")
    with pytest.raises(ValueError, match=r"policy\.proprio\.center=\(0, 'x'\) is a tuple; expected tuple\[float"):
        ProprioConfig(center=(0, "x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": "abc"}, r"policy\.window='abc' is a str; expected int"),
        ({"head": "lstm"}, r"policy\.head='lstm' is a str; expected the fields of HeadConfig"),
        ({"head": {}}, r"policy\.head has no field 'kind'"),
        ({"cameras": None}, r"policy\.cameras=None is a NoneType; expected tuple"),
    ],
)
def test_a_stored_configuration_with_a_value_of_another_type_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(PolicyConfig, {**to_dict(PolicyConfig()), **changes}, "policy")


def test_whole_numbers_do_for_float_and_lists_for_tuples():
    changed = cli.override(ExperimentConfig(), **{"train.epochs": 5, "demonstrations.image_size": [64, 64]})
    assert changed.train.epochs == 5 and changed.demonstrations.image_size == (64, 64)
    assert from_dict(ExperimentConfig, to_dict(changed)) == changed


def test_steps_that_a_command_line_names_count_although_the_preset_says_epochs():
    # Fails if a run of two steps of a preset with five epochs trains for five epochs.
    presets = {"epochs": cli.override(ExperimentConfig(), **{"train.epochs": 5})}

    def parsed(*argv: str):
        train = cli.parse(presets, "epochs", description="", argv=argv)[1].train
        return train.steps, train.epochs

    assert parsed("--train.steps", "2") == parsed("--train.steps=2") == (2, 0)
    assert parsed("--train.steps", "2", "--train.epochs", "1") == (2, 1)
    assert parsed() == (ExperimentConfig().train.steps, 5)
    # So do those that a search or a comparison holds fixed.
    train = cli.override(presets["epochs"], **{"train.steps": 2}).train
    assert (train.steps, train.epochs) == (2, 0)
    train = cli.override(presets["epochs"], **{"train.epochs": 3, "train.steps": 2}).train
    assert (train.steps, train.epochs) == (2, 3)


def test_a_robot_comes_from_a_json_file_and_shifts_by_camera(tmp_path):
    spec = robot.RobotSpec("mine", 10.0, (robot.Camera("top"),), robot.CALVIN.action)
    (tmp_path / "mine.json").write_text(json.dumps(spec.to_json()))
    argv = ["--policy.robot", str(tmp_path / "mine.json"), "--policy.cameras", "top", "--data.shift", "top", "3"]
    config = cli.read(ExperimentConfig, argv=argv)
    assert config.policy.robot == spec and config.data.shifts == {"static": 10, "wrist": 4, "top": 3}
    assert cli.read(ExperimentConfig, argv=[]).policy.robot == robot.CALVIN


def test_a_robot_that_no_file_describes_is_refused_with_the_field(tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"name": "mine", "action": [{"name": "a", "kind": "sideways"}]}')
    for name, message in (("mine.json", "sideways"), ("nowhere.json", "cannot be read")):
        with pytest.raises(SystemExit):
            cli.read(ExperimentConfig, argv=["--policy.robot", str(tmp_path / name)])
        assert message in capsys.readouterr().err


def leaves(config, prefix=""):
    """(dotted name, value) of every field that has no fields of its own."""
    for name in schema.hints(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not hasattr(value, "to_json"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_every_setting_of_a_run_is_a_flag(capsys):
    argv, expected = [], ExperimentConfig()
    for path, value in leaves(expected):
        if isinstance(value, dict):
            words = [str(x) for item in value.items() for x in item]
        elif path in cli.wholes(expected):
            words = [json.dumps([])]
        elif isinstance(value, robot.RobotSpec):
            continue  # a file: test_a_robot_comes_from_a_json_file_and_shifts_by_camera
        else:
            words = [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
        argv += [f"--{path}", *words]
    try:
        assert read(*argv) == expected
    except SystemExit:
        raise AssertionError(capsys.readouterr().out) from None


def read(*argv):
    return cli.parse({"small": ExperimentConfig()}, "small", description="", argv=argv)[1]


def test_sensors_stages_and_heads_are_given_whole_by_names_json_or_file(tmp_path):
    config = read("--policy.sensors", "imu,lidar", "--policy.head.kind=flow", "--policy.head.num-steps", "3")
    assert [sensor.kind for sensor in config.policy.sensors] == ["imu", "lidar"]
    assert config.policy.head == flow.FlowHeadConfig(num_steps=3)
    stages = [{"steps": 3, "sources": {"robot": 1.0}}, {"steps": 4, "name": "late", "weights": {"actions": 2.0}}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    for given in (json.dumps(stages), str(tmp_path / "stages.json")):
        more = ("--train.stages.0.steps", "5", "--policy.sensors", '["depth", {"kind": "imu", "name": "hip"}]')
        made = read("--train.stages", given, *more)
        assert to_dict(made)["train"]["stages"][1]["weights"] == {"actions": 2.0}
        assert made.train.stages[0].steps == 5
        assert [(sensor.kind, sensor.name) for sensor in made.policy.sensors] == [("depth", "depth"), ("imu", "hip")]
    # A head and what goes with it are checked together, in any order.
    both = read("--policy.head", "discrete", "--policy.readout", "token", "--policy.history", "interleaved")
    assert (both.policy.head.kind_of(type(both.policy.head)), both.policy.readout) == ("discrete", "token")


@pytest.mark.parametrize(
    ("argv", "sources"),
    [
        (["--train.sources", "robot", "4", "web", "1"], {"robot": 4.0, "web": 1.0}),
        (["--train.sources.web", "1", "--train.sources.robot=2"], {"robot": 2.0, "questions": 1.0, "web": 1.0}),
        (["--train.steps", "3"], {"robot": 3.0, "questions": 1.0}),
    ],
)
def test_a_mapping_takes_keys_that_its_preset_has_not(argv, sources):
    start = cli.override(ExperimentConfig(), **{"train.sources": {"robot": 3.0, "questions": 1.0}})
    assert cli.read(start, argv=argv).train.sources == sources


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--policy.sensors", "sonar"), "--policy.sensors: no sensor 'sonar'. Registered: audio,"),
        (("--policy.sensors", '{"kind": "imu"}'), """--policy.sensors: '{"kind": "imu"}' is no JSON list"""),
        (("--policy.sensors", '[{"kind": "imu", "dropout": 2}]'), "policy.sensors.imu.dropout=2 must lie in"),
        (("--policy.sensors.imu.dropout", "0"), "policy.sensors.imu.dropout is a setting of a part of policy.sensors"),
        (("--train.stages", '[{"stepss": 3}]'), "train.stages[0] has no field 'stepss'; did you mean 'steps'?"),
        (("--train.stages", "[3"), "--train.stages: '[3' is neither JSON"),
        (("--train.stages", "nowhere.json"), "nowhere.json"),
        (("--train.weights", "x"), "--train.weights is a setting of a part of train.stages"),
        (("--policy.head", "mlpp"), "--policy.head: no head 'mlpp'; did you mean 'mlp'? Registered: attention,"),
    ],
)
def test_what_cannot_be_given_so_is_answered_with_a_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--train.learning_rte", "--optimizer.learning_rate"),  # another room, misspelt
        ("--learning-rate", "--optimizer.learning_rate"),
        ("--lr", "--optimizer.learning_rate"),
        ("--data.roots", "--data.root"),  # data.others.roots is spelt so in its last word
        ("--head.kind", "--policy.head.kind"),
        ("--policy.head.kindd", "--policy.head.kind"),
        ("--no-train.resme", "--train.resume"),
        ("--prest", "--preset"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest_however_little_alike_they_are(typed, meant, capsys):
    with pytest.raises(SystemExit) as end:
        read(typed, "x")
    assert end.value.code == 2
    assert f"is no flag of this program; did you mean {meant}?" in capsys.readouterr().err


def test_flags_that_there_are_are_never_called_misspelt(capsys):
    known = ("--no-train.resume", "--policy.head.kind=flow", "--policy.head.num-steps", "3", "--train.sources.web", "1")
    with pytest.raises(SystemExit):
        read(*known, "--train.stages", '[{"steps": 3}]', "--train.stages.0.steps", "5", "--train.steps", "many")
    out = capsys.readouterr()
    assert "is no flag" not in out.out + out.err and "--train.steps" in out.out + out.err


def test_a_program_with_a_field_of_its_own_keeps_the_name_that_is_short_for_another_elsewhere():
    """`--resume` is `--train.resume` in training, and itself where there is no train."""

    @dataclasses.dataclass(frozen=True)
    class Own:
        resume: bool = False

    _, found = cli.parse({"own": Own()}, "own", description="", argv=["--resume"])
    assert found.resume
