"""Turn a checkpoint that RoboVLMs trained into a directory that `load_policy` opens.

    python -m experiments.convert_weights --from kosmos_ph_calvin_abcd.pt --config kosmos_ph_calvin_abcd.json \\
        --backbone hf://microsoft/kosmos-2-patch14-224 --out policies/kosmos_ph_calvin_abcd

The directory is complete: configuration, tokenizer, image settings and parameters. A report says which tensor became
which parameter, and how far the written policy is from the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
import sys
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict

from robovlms_jax import atomic, ending, upstream
from robovlms_jax import cli as command_line
from robovlms_jax.backbones import registry
from robovlms_jax.control import robot
from robovlms_jax.control.interface import Observation
from robovlms_jax.data import statistics
from robovlms_jax.inputs import tokenizers
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, load, logs
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import checkpoints
from robovlms_jax.weights import convert, quantize, rearrange, rules, sources

logger = logging.getLogger(__name__)

REPORT = "conversion.json"
INSTRUCTION = "open the drawer"
"""What the self-check asks the policy to do."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where to."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Checkpoint: a .pt or .ckpt file with a state dict, bare or as Lightning or DeepSpeed wrap it; safetensors; or the
    .ckpt folder that Lightning writes with DeepSpeed."""
    config: str
    """The JSON it was trained with, as upstream publishes or writes it."""
    out: str
    """Directory to write; load_policy opens it."""
    backbone: str = ""
    """Where the backbone's config.json, tokenizer and image processor are: a directory or hf://OWNER/NAME. Weights are
    not needed. Empty: vlm.pretrained_model_name_or_path of the JSON."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Type the backbone is stored and served in. Empty: what upstream evaluates in, bfloat16 where trainer.precision is
    bf16 and float32 otherwise."""
    statistics: str = ""
    """Policies of OpenVLADataset: JSON with the action quantiles of the dataset it shall act in, as OpenVLA and
    RoboVLMs publish them; the policy then acts in that dataset's units. Empty: it acts in the quantiles' units,
    [-1, 1], which experiments.evaluate --env simpler scales by --simpler_statistics."""
    allow_missing: tuple[str, ...] = ()
    """Regular expressions of parameter paths that the checkpoint may lack; they keep random values."""
    allow_unused: tuple[str, ...] = ()
    """Regular expressions of tensor names that may be left over."""


def main(config: ConvertConfig) -> dict[str, Any]:
    """Convert, check, report; returns the report. Raises ValueError or OSError with what to do about it."""
    target = pathlib.Path(config.out).expanduser()
    atomic.require_free(target)
    experiment = _experiment(config)
    source = upstream.open_checkpoint(config.source, experiment.policy.num_queries)
    files = tokenizers.resolve_weights(experiment.backbone.weights, tensors=False)
    registry.from_directory(files), tokenizers.load_tokenizer(files)  # what they lack is said with the user's path
    backbone = build.backbone_from_assets(experiment.backbone, tokenizers.read_assets(files))
    backbone = build.fit_weights(backbone, source)
    model = build.make_model(experiment, backbone.vlm)

    params, table, report = _convert(config, model, source, experiment.backbone.dtype)
    policy = BatchedVLAPolicy(model, params, backbone.encoder(0), slots=1)
    logger.info("compiling a control step, to compare what is written with what was read")
    before = _act(policy)
    serving = {"config": to_dict(experiment), "assets": dict(backbone.assets)}
    with atomic.becoming_folder(target) as folder:
        checkpoints.write_policy(folder, params, serving)
        logger.info("reading what was written")
        del params, policy.params  # they are read again now; two copies of a large model need not lie in memory

        opened, policy.params, _ = load.open_model(folder)  # the step is compiled already
        if opened != model:
            raise ValueError(f"{target} opens as another model than was written: {opened} instead of {model}.")
        report |= {
            "difference_parameters": _largest_difference(table, source, policy.params),
            "difference_actions": float(np.abs(_act(policy) - before).max()),
            "first_action": before[0, 0].tolist(),
        }
        atomic.write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    ending.show(_describe(report, target))
    return report


def _experiment(config: ConvertConfig) -> ExperimentConfig:
    experiment = upstream.load_experiment(config.config)
    dtype = config.dtype or upstream.evaluation_dtype(upstream.read_json(config.config))
    backbone = dataclasses.replace(
        experiment.backbone, dtype=dtype, weights=config.backbone or experiment.backbone.weights
    )
    if not config.backbone and not pathlib.Path(backbone.weights).is_dir():
        raise FileNotFoundError(
            f"{config.config} names the backbone {backbone.weights}, which is no directory here; pass --backbone with "
            "the directory, or hf://OWNER/NAME, that its config.json and tokenizer come from."
        )
    return dataclasses.replace(experiment, backbone=backbone, policy=_bounded(config, experiment))


def _bounded(config: ConvertConfig, experiment: ExperimentConfig) -> PolicyConfig:
    """The policy with numbers for its action bounds, which scaling by quantiles would leave to training data, and
    without the losses that acting needs not."""
    policy = dataclasses.replace(experiment.policy, auxiliary=AuxiliaryConfig())
    if policy.action_scaling == "bounds":
        if config.statistics:
            raise ValueError("--statistics is of policies trained on OpenVLADataset; this one has bounds of its own.")
        return policy
    share = 0.65 if experiment.data.compat_second_norm else 1.0
    units = () if config.statistics else ("1", "1")
    if policy.representation == "robot":
        own = robot.end_effector("OpenVLADataset", *units, state=policy.robot.state)
        policy = dataclasses.replace(policy, robot=own)
    if not config.statistics:
        bounds = {"action_low": (-share,) * 6, "action_high": (share,) * 6}
        return dataclasses.replace(policy, action_scaling="bounds", **bounds)
    found = statistics.read(config.statistics, ["it"])
    if set(found) != {"it"}:
        raise ValueError(f"{config.statistics} holds statistics of {sorted(found)}; pass a file of one dataset.")
    return policy.with_statistics(statistics.shrink(found["it"].action, share))


def _convert(
    config: ConvertConfig, model: VLA, source: sources.Source, dtype: str
) -> tuple[Any, rules.Rules, dict[str, Any]]:
    """Parameters in the type they are served in, the rules that made them, and what to say about it."""
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices(backend="cpu")[:1])
    shapes, shardings = build.abstract_params(model, mesh)
    types = quantize.stored_types(shapes, dtype)
    stored = jax.tree.map(lambda x, kind: jax.ShapeDtypeStruct(x.shape, kind), shapes, types)
    parameters = {path: x.shape for path, x in flatten_dict(shapes, sep="/").items()}
    spare = {f"backbone/{path}": shape for path, shape in build.spare_params(model, shapes).items()}
    table, absent, left = upstream.allow(
        upstream.policy_rules(model),
        source.shapes,
        parameters,
        missing=config.allow_missing,
        unused=config.allow_unused,
    )
    loaded = flatten_dict(convert.load_params(table, source, stored, shardings, spare=spare), sep="/")
    params = build.fill_params(model, mesh, 0, loaded)
    tensors = [
        {"tensor": name, "shape": list(source.shapes[name]), "dtype": _dtype(source, name), "becomes": target}
        for name, target in _destinations(table, source, spare)
    ]
    report = {
        "checkpoint": source.name,
        "tensors": tensors,
        "missing": absent,
        "unused": left,
        "parameters": build.count(shapes),
        "stored": sorted({str(x.dtype) for x in jax.tree.leaves(stored)}),
    }
    return params, table, report


def _destinations(table: rules.Rules, source: sources.Source, spare: Container[str]) -> Iterator[tuple[str, str]]:
    """Every tensor of a source that fits the rules, and what became of it. spare: parameters the policy has not."""
    for name in source.shapes:
        canonical = rules.canonical(table, name)
        targets = [rule.target for rule in table if isinstance(rule, rules.Rule) and rule.match(canonical)[0]]
        targets += [x.table for x in table if isinstance(x, rules.Tied) and x.match(canonical)]
        ignored = [x.reason for x in table if isinstance(x, rules.Ignore) and re.fullmatch(x.source, canonical)]
        if targets and all(target in spare for target in targets):
            yield name, f"ignored: this policy has no {targets[0]}"
        else:
            yield name, ", ".join(targets) or f"ignored: {ignored[0]}"


def _largest_difference(table: rules.Rules, source: sources.Source, params: Any) -> float:
    """Between every tensor of the checkpoint and what the opened policy holds in its place, laid out as it was."""
    flat, worst = flatten_dict(params, sep="/"), 0.0
    for name, shape in source.shapes.items():
        canonical = rules.canonical(table, name)
        for rule in table:
            is_match, layer = rule.match(canonical) if isinstance(rule, rules.Rule) else (False, None)
            if not is_match or rule.target not in flat:  # loading refused what neither the policy nor its backbone has
                continue
            ours = np.asarray(flat[rule.target] if layer is None else flat[rule.target][layer])
            theirs = source.read(name, (slice(None),) * len(shape)).astype(np.float32)
            expected = rearrange.Rearrange.parse(rule.pattern, ours.ndim).forward(
                lambda cut, theirs=theirs: theirs[cut], ours.shape, (slice(None),) * ours.ndim
            )
            worst = max(worst, float(np.abs(ours.astype(np.float32) - expected).max(initial=0.0)))
    return worst


def _act(policy: BatchedVLAPolicy) -> np.ndarray:
    """float32[2, C, 7]: two control steps on pictures that are always the same. Raises ValueError on NaN."""
    random = np.random.default_rng(0)
    cameras = policy.model.config.cameras
    policy.reset([0], [INSTRUCTION])
    chunks = []
    for _ in range(2):
        images = {camera: random.integers(0, 256, (200, 200, 3), dtype=np.uint8) for camera in cameras}
        chunks.append(policy.act([Observation(images)], [0])[0].actions)
    actions = np.stack(chunks)
    if not np.isfinite(actions).all():
        raise ValueError("the policy's actions are not finite; the checkpoint holds NaN, or overflows in this dtype.")
    return actions


def _dtype(source: sources.Source, name: str) -> str:
    return str(source.read(name, (slice(0, 0),) * len(source.shapes[name])).dtype)


def _describe(report: Mapping[str, Any], target: pathlib.Path) -> str:
    """The report as text; tensors that differ only in their layer share a line."""
    rows: dict[tuple[str, ...], int] = {}
    for entry in report["tensors"]:
        name = re.sub(r"\.\d+\.", ".*.", rules.normalize(entry["tensor"]), count=1)
        row = (name, str(entry["shape"]), entry["dtype"], entry["becomes"])
        rows[row] = rows.get(row, 0) + 1
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    used = sum(not entry["becomes"].startswith("ignored") for entry in report["tensors"])
    lines = [f"{report['checkpoint']}: {used} of {len(report['tensors'])} tensors used"]
    for row, count in rows.items():
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"  {'  '.join(cells)}  -> {row[3]}" + (f"  ({count} layers)" if count > 1 else ""))
    for kind in ("missing", "unused"):
        lines += [f"  {kind}, allowed: {name}" for name in report[kind]]
    lines += [
        f"{report['parameters']:,} parameters, stored as {' and '.join(report['stored'])}",
        f"self-check: opened again, its parameters differ from the checkpoint by at most "
        f"{report['difference_parameters']:.3g}, its actions from those before writing by "
        f"{report['difference_actions']:.3g}",
        f"first action for {INSTRUCTION!r} on noise: {np.round(report['first_action'], 4).tolist()}",
        f'written: {target} ({REPORT} has all of this); robovlms_jax.load.load_policy("{target}") opens it',
    ]
    return "\n".join(lines)


def cli(argv: list[str] | None = None) -> None:
    """Command line; errors of the user end the process with a message and status 1."""
    logs.to_stderr()
    config = command_line.read(ConvertConfig, description=__doc__, argv=argv)
    try:
        main(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
