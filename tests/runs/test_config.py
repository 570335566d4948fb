"""Configuration: round trip, checks between parts, presets on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robovlms_jax import cli
from robovlms_jax.actions.discretize import QuantileBins
from robovlms_jax.control import robot
from robovlms_jax.data.config import DataConfig
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import discrete
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.training.config import OptimizerConfig, StageConfig, TrainConfig

SO100 = robot.RobotSpec("so100", 30.0, (robot.Camera("top"),), robot.CALVIN.action)


def test_round_trip_through_json():
    # A checkpoint stores the configuration as JSON; tuples and the head's type must survive.
    config = ExperimentConfig(
        policy=PolicyConfig(cameras=("static",), head=LSTMHeadConfig(hidden_size=7, trunk=(3, 2))),
        train=TrainConfig(trainable=("^head/",)),
    )
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_saved_field_is_named():
    values = to_dict(ExperimentConfig())
    values["train"]["batchsize"] = 3
    with pytest.raises(ValueError, match=r"config.train has no field 'batchsize'; did you mean 'batch_size'"):
        from_dict(ExperimentConfig, values)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (PolicyConfig, {"window": 0}, "policy.window=0"),
        (PolicyConfig, {"cameras": ("front",), "robot": SO100}, "which robot 'so100' has not"),
        (PolicyConfig, {"cameras": ("static", "static")}, "each camera once"),
        (PolicyConfig, {"action_low": (1.0,) * 6}, "low < high"),
        (TrainConfig, {"trainable": ()}, "nothing would be trained"),
        (TrainConfig, {"trainable": ("(",)}, "not a regular expression"),
        (MeshConfig, {"data": -1, "fsdp": -1}, "at most one"),
        (DataConfig, {"max_corrupt_share": 1.0}, "max_corrupt_share"),
    ],
)
def test_a_bad_value_is_refused_where_it_is_made(part, values, message):
    with pytest.raises(ValueError, match=message):
        part(**values)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 8, 1), 8, (1, 8, 1)), ((-1, 3, 1), 8, None)],
)
def test_mesh_sizes(mesh, devices, sizes):
    config = ExperimentConfig(mesh=MeshConfig(*mesh))
    if sizes is None:
        with pytest.raises(ValueError, match="does not make the 8 devices"):
            config.mesh_sizes(devices)
    else:
        assert config.mesh_sizes(devices) == sizes


def test_batch_that_does_not_divide_names_one_that_does():
    config = ExperimentConfig(
        train=TrainConfig(batch_size=36, accumulation=2),
        data=DataConfig(windows_per_segment=4),
        mesh=MeshConfig(2, 2, 1),
    )
    with pytest.raises(ValueError, match=r"9 segments .* try train.batch_size=32 or 64\."):
        config.validate(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_scale": 0.1},
            r"optimizer\.min_scale=0\.1 has no effect with optimizer\.schedule=constant: it is",
        ),
        ({"schedule": "rsqrt", "step_every": 9}, r"optimizer\.step_every=9 .* read with step\."),
        ({"schedule": "cosine", "step_factor": 0.5}, r"optimizer\.step_factor=0\.5"),
        ({"schedule": "step", "rsqrt_steps": 9}, r"optimizer\.rsqrt_steps=9"),
        ({"schedule": "cosine", "decay_share": 0.5}, r"optimizer\.decay_share=0\.5"),
        ({"name": "lion", "epsilon": 1e-6}, r"optimizer\.epsilon=1e-06 has no effect with optimizer\.name=lion"),
    ],
)
def test_an_optimizers_setting_that_nothing_reads_is_refused_before_training_and_still_loads(settings, message):
    optimizer = from_dict(OptimizerConfig, settings)  # as a checkpoint of before has it
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(optimizer=optimizer).validate(1)
    stage = StageConfig(2, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"train\.stages\[0\]\." + message.split(" has")[0]):
        ExperimentConfig(train=TrainConfig(stages=(stage,))).validate(1)
    ExperimentConfig(optimizer=OptimizerConfig(min_scale=0.0, step_every=10_000)).validate(1)  # the defaults, said


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            TrainConfig(stages=(StageConfig(steps=1, name="words", sources={"robot": 1.0, "web": 1.0}),)),
            r"train\.stages, stage 'words': sources names \['web'\]; this run has data of \['arm', 'robot'\]",
        ),
        (
            TrainConfig(stages=(StageConfig(1), StageConfig(1, sources={"arms": 1.0}))),
            r"train\.stages, stage '2': sources names \['arms'\]",
        ),
        (
            TrainConfig(sources={"robot": 1.0, "web": 0.0}),
            r"train\.sources names \['web'\]; .* named in data\.vl\.paths",
        ),
        (
            TrainConfig(sources={"robot": 1.0, "arm": 0.0}, source_weights={"arm": 2.0}),
            r"train\.source_weights names \['arm'\]; sources with a loss that this run draws from are robot",
        ),
    ],
)
def test_sources_that_a_run_has_not_are_known_without_any_data(train, message):
    with pytest.raises(ValueError, match=message):
        cli.override(ExperimentConfig(train=train), **{"data.others.roots": {"arm": "nowhere"}}).validate(1)


def test_epochs_become_steps():
    config = cli.override(
        ExperimentConfig(), **{"train.epochs": 5.0, "train.batch_size": 128, "optimizer.warmup_epochs": 0.25}
    )
    resolved = config.resolve(num_windows=128_000, text_length=24)
    assert (resolved.train.steps, resolved.optimizer.warmup_steps, resolved.data.text_length) == (5000, 250, 24)
    assert resolved.resolve(num_windows=1, text_length=99) == resolved


PRESETS = {"small": ExperimentConfig(), "large": cli.override(ExperimentConfig(), **{"train.batch_size": 512})}


def parse(*argv):
    return cli.parse(PRESETS, "small", description="test", argv=argv)


def test_preset_and_dotted_overrides():
    name, config = parse(
        "--preset", "large", "--policy.head.hidden-size", "32", "--train.output", "x", "--policy.cameras", "static"
    )
    assert (name, config.train.batch_size, config.policy.head.hidden_size, config.policy.cameras) == (
        "large",
        512,
        32,
        ("static",),
    )
    assert parse("--resume")[1].train.resume
    assert parse("--preset=large", "--train.batch-size", "4")[1].train.batch_size == 4


def test_a_file_of_upstreams_is_a_starting_point_like_a_preset(capsys):
    def read(file):
        if file == "missing.json":
            raise FileNotFoundError("no file missing.json")
        return cli.override(ExperimentConfig(), **{"policy.window": 5})

    def parse_file(*argv):
        return cli.parse(PRESETS, "small", description="test", read_json=read, argv=argv)

    for flags in (["--upstream_json", "a/b.json"], ["--upstream-json=a/b.json"]):
        name, config = parse_file(*flags, "--train.steps", "7")
        assert (name, config.policy.window, config.train.steps) == ("b", 5, 7)
    for flags, message in (
        (["--upstream_json", "missing.json"], "no file missing.json"),
        (["--preset", "small", "--upstream_json", "b.json"], "pass one of them"),
    ):
        with pytest.raises(SystemExit) as error:
            parse_file(*flags)
        assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "larg"], "did you mean 'large'"),
        (["--preset"], "--preset needs a value"),
        (["--presett", "large"], "--presett is no flag of this program; did you mean --preset?"),
        (["--prest=large"], "--prest is no flag of this program; did you mean --preset?"),
        (["--resum"], "--resum is no flag of this program; did you mean --resume?"),
        (["--train.batchsize", "4"], "--train.batch_size"),
        (["--train.steps", "-1"], "train.steps=-1"),
    ],
)
def test_mistakes_end_with_status_2_and_a_hint(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert error.value.code == 2
    out = capsys.readouterr()
    assert message in (out.err + out.out).replace("\n", " ")


def test_help_reads_like_documentation(capsys):
    with pytest.raises(SystemExit):
        parse("--help-all")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--data.windows_per_segment" in text
    assert "windows that share one run of W + K - 1 frames" in text


ACTIONS = {
    "q01": np.array([-0.5] * 5 + [0.25, -1.0]),
    "q99": np.array([0.75] * 5 + [0.25, 1.0]),
    "mean": np.array([0.125] * 6 + [0.0]),
    "std": np.array([0.25] * 5 + [0.0, 1.0]),
}


@pytest.mark.parametrize(
    ("scaling", "low", "high"),
    [
        # The last arm dimension never changes: bounds one unit apart, so it is 0 after scaling and itself again after.
        ("quantile", (-0.5,) * 5 + (-0.25,), (0.75,) * 5 + (0.75,)),
        ("mean_std", (0.125 - 2 * 0.25,) * 5 + (-0.375,), (0.125 + 2 * 0.25,) * 5 + (0.625,)),
        ("bounds", (-0.65,) * 6, (0.65,) * 6),
    ],
)
def test_action_bounds_come_from_the_training_split_and_into_the_checkpoint(scaling, low, high):
    config = ExperimentConfig(policy=PolicyConfig(action_scaling=scaling, action_num_std=2.0))
    if scaling != "bounds":
        with pytest.raises(ValueError, match="takes its bounds from training data"):
            _ = config.policy.normalizer
    resolved = config.resolve(1000, 32, ACTIONS)
    saved = from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(resolved))))
    assert saved.policy.normalizer.low == low
    assert saved.policy.normalizer.high == high


def test_quantile_bins_come_from_the_training_split_and_into_the_checkpoint():
    head = discrete.DiscreteHeadConfig(binning="quantile", num_bins=16)
    config = ExperimentConfig(policy=PolicyConfig(history="interleaved", readout="token", head=head))
    with pytest.raises(ValueError, match="takes its edges from training data"):
        _ = config.policy.head.bins
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 7)).astype(np.float32)
    policy = config.policy.with_bins(actions)
    saved = from_dict(PolicyConfig, json.loads(json.dumps(to_dict(policy))))
    assert saved == policy
    assert saved.head.bins == QuantileBins.of(policy.normalizer.normalize(actions), 16, (6,))
