"""One control step of a checkpoint as a program that runs without this package.

    python -m experiments.export --checkpoint runs/sample --out exported --to stablehlo --instructions "open the drawer"

Writes program.json (inputs, outputs, robot, the instructions' tokens), tensors.safetensors (the carry that an episode
begins with; for stablehlo the weights, too), backbone/ (tokenizer and config.json) and the program: program.stablehlo,
program.onnx or program.tflite. docs/serving.md shows how each is run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.export
import jax.extend.core
import safetensors.flax

from robovlms_jax import atomic, cli, ending, extras
from robovlms_jax.policies.heads import flow, gpt, lstm
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import load, logs, program, saved
from robovlms_jax.training import checkpoints

log = logging.getLogger(__name__)


PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and as what."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str
    """A new or empty folder."""
    to: Literal["stablehlo", "onnx", "litert"] = "stablehlo"
    """stablehlo: jax.export's, weights in a file of their own, needs JAX where it runs. onnx, litert: weights inside,
    computed in float32, run by onnxruntime or by LiteRT; not for every policy (see `require_form`)."""
    weights: load.Weights | None = None
    """How the backbone's parameters are kept, and w8a8 what they multiply; None: in the type that it computes in."""
    instructions: tuple[str, ...] = ()
    """Sentences whose tokens program.json holds, so that no tokenizer is needed where it runs."""
    platforms: tuple[str, ...] = ("cpu", "cuda")
    """Of a stablehlo program: cpu, cuda, rocm, tpu."""

    def __post_init__(self):
        if not self.platforms or not set(self.platforms) <= set(PLATFORMS):
            raise ValueError(f"platforms={list(self.platforms)}: expected one or more of {list(PLATFORMS)}.")


def write_stablehlo(step: program.Program, folder: pathlib.Path, config: ExportConfig) -> dict[str, Any]:
    """program.stablehlo: weights, carry and observation are its arguments."""
    _require("flatbuffers", "export")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _arguments(step, weights=True)]
    exported = jax.export.export(jax.jit(step.step), platforms=config.platforms)(*shapes)
    with atomic.replacing(folder / "program.stablehlo") as file:
        file.write(exported.serialize())
    return {
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }


def write_onnx(step: program.Program, folder: pathlib.Path, config: ExportConfig) -> dict[str, Any]:
    """program.onnx, and program.onnx.data beside it where the weights are large. Raises ValueError for an operation
    that has no translation."""
    jax2onnx = _require("jax2onnx", "onnx")
    arguments = _arguments(step, weights=False)
    # Traced before: jax2onnx replaces functions of jax.numpy while it traces, not all of them with their arguments.
    closed = jax.make_jaxpr(step.frozen)(*arguments)
    try:
        jax2onnx.to_onnx(
            jax.extend.core.jaxpr_as_fun(closed),
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments],
            model_name="control_step",
            input_names=[*step.carry, *step.observed],
            output_names=[f"next_{name}" if name in step.carry else name for name in step.results],
            return_mode="file",
            output_path=str(folder / "program.onnx"),
        )
    except NotImplementedError as error:
        raise ValueError(
            f"jax2onnx cannot express this policy in ONNX ({error}); export it with --to stablehlo."
        ) from error
    return {"opset": 23, "prefix_of_carry_outputs": "next_"}


def write_litert(step: program.Program, folder: pathlib.Path, config: ExportConfig) -> dict[str, Any]:
    """program.tflite with the signature `step`, by way of a TensorFlow SavedModel."""
    tf = _require("tensorflow", "litert")
    from jax.experimental import jax2tf

    closed = jax.make_jaxpr(step.frozen)(*_arguments(step, weights=False))
    converted = jax2tf.convert(jax.extend.core.jaxpr_as_fun(closed))
    names = [*step.carry, *step.observed]
    specs = {
        name: tf.TensorSpec(x.shape, x.dtype, name=name) for name, x in zip(names, _arguments(step, weights=False))
    }

    def call(**arguments):
        results = converted(*(arguments[name] for name in names))
        return {f"next_{name}" if name in step.carry else name: x for name, x in zip(step.results, results)}

    module = tf.Module()
    module.step = tf.function(call, autograph=False).get_concrete_function(**specs)
    with tempfile.TemporaryDirectory() as scratch:
        tf.saved_model.save(module, scratch, signatures={"step": module.step})
        converter = tf.lite.TFLiteConverter.from_saved_model(scratch, signature_keys=["step"])
        with atomic.replacing(folder / "program.tflite") as file:
            file.write(converter.convert())
    return {"signature": "step", "prefix_of_carry_outputs": "next_", "tensorflow": tf.__version__}


WRITERS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "stablehlo": ("program.stablehlo", write_stablehlo),
    "onnx": ("program.onnx", write_onnx),
    "litert": ("program.tflite", write_litert),
}


def export(config: ExportConfig) -> pathlib.Path:
    """Writes the folder and returns it. What fails leaves nothing behind.

    Raises ValueError, FileNotFoundError, FileExistsError, ImportError with what to do.
    """
    folder = pathlib.Path(config.out)
    atomic.require_free(folder)
    apart = config.to == "stablehlo"
    log.info("reading %s and tracing its control step", config.checkpoint)
    directory = checkpoints.locate(config.checkpoint, strict=True)
    step = program.make(str(directory), config.weights, config.instructions, None if apart else "float32")
    require_form(step.model, config.to)
    description = step.describe(config.instructions, weights=apart)
    if description["actions"]["representation"] != "robot":
        log.warning("the program's actions are %s, not the robot's own", description["actions"]["representation"])
    log.info("writing %s as %s", folder, config.to)
    with atomic.becoming_folder(folder) as unfinished:
        _write(step, unfinished, config, description)
    return folder


def _write(step: program.Program, folder: pathlib.Path, config: ExportConfig, description: dict[str, Any]) -> None:
    """All files of an export, into an empty folder."""
    apart = config.to == "stablehlo"
    file, write = WRITERS[config.to]
    details = write(step, folder, config)
    tensors = {**(step.weights if apart else {}), **{name: jax.numpy.asarray(x) for name, x in step.carry.items()}}
    safetensors.flax.save_file(tensors, folder / "tensors.safetensors")
    description |= {
        "program": {"file": file, "kind": config.to, **details},
        "tensors": "tensors.safetensors",
        "weights": config.weights or str(step.model.vlm.dtype),
        "checkpoint": str(config.checkpoint),
    }
    for name, text in saved.read_checkpoint(checkpoints.locate(config.checkpoint))[1].items():
        path = folder / "backbone" / name
        path.parent.mkdir(exist_ok=True)
        atomic.write_text(path, text)
    # Last, so that a folder with a description is whole.
    atomic.write_text(folder / "program.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def require_form(model: VLA, to: str) -> None:
    """Raises ValueError for a policy that was seen to fail in this form, at conversion or, worse, where it runs."""
    policy, found = model.config, []
    if to == "stablehlo":
        return
    if model.vlm.storage == "w8a8":
        found.append("activations in int8 (weights=w8a8)")
    if policy.history in ("interleaved", "video"):
        found.append(f"history={policy.history}, which keeps tokens")
    if isinstance(policy.head, flow.FlowHeadConfig):
        found.append("a flow head, which draws noise")
    elif to == "litert" and not isinstance(policy.head, lstm.LSTMHeadConfig | gpt.GPTHeadConfig):
        found.append(f"a head other than lstm and gpt ({type(policy.head).__name__})")
    if found:
        raise ValueError(f"a policy with {' and '.join(found)} has no form in {to}: export it with --to stablehlo.")


def _arguments(step: program.Program, *, weights: bool) -> list[Any]:
    return [*(step.weights.values() if weights else ()), *step.carry.values(), *step.observed.values()]


def _require(module: str, extra: str) -> Any:
    """An optional package. Raises ImportError that says what to install."""
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module} ({error}): {extras.install(extra)}, for onnx and litert in an "
            "environment of their own."
        ) from error


def main() -> None:
    """Errors of the user end the process with a message and status 1."""
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(ExportConfig, description=__doc__)
    try:
        folder = export(config)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ending.show(f"{folder}: {config.to}, {size / 2**20:.1f} MiB, {', '.join(sorted(x.name for x in folder.iterdir()))}")


if __name__ == "__main__":
    main()
