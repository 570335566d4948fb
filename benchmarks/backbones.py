"""Every backbone beside PyTorch: parity, coverage, size, memory.   python -m benchmarks.backbones

Prints JSON. What is measured:

  parity     tiny twins in float32, every parameter random: largest difference of logits, and of gradients of each
             parameter, as a share of the largest value; two cameras, prompts of two lengths padded on the right
  coverage   tensors of the full-size torch model (on its meta device) that the rules bring to their place, and
             parameters that they fill; strict, so a hole is an error
  size       parameters, tokens that an image adds to the sequence or has beside it, bytes of parameters in bfloat16
             (serving) and of float32 parameters, gradients and AdamW's moments (training everything); arithmetic,
             without activations

It needs the test dependencies (torch, transformers) and tests/.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from benchmarks import machine
from robovlms_jax import cli, json_files
from robovlms_jax.backbones import base, registry
from robovlms_jax.weights import convert
from tests.backbones import families, oracle, test_encoder_decoder, test_parity, test_registry

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: python -m benchmarks.backbones --docs -->", "<!-- end of table -->"


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare every registered backbone with PyTorch."""

    names: tuple[str, ...] = tuple(test_registry.PUBLISHED)
    """Backbones, by their registered names."""
    parity: bool = True
    """Measure parity; the rest takes seconds."""
    docs: bool = False
    """Write the table into docs/backbones.md."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file. Backbones that it holds and `names` does not keep their rows, each with the
    revision it was measured at."""


def main(args: Args) -> None:
    """Print the result as JSON."""
    rows = {name: static(name) for name in args.names}
    if args.parity:
        measured: dict[str, dict[str, float]] = {}  # by the tiny twin, which sizes of one family share
        for name, row in rows.items():
            twin = twin_of(name)
            if twin not in measured:
                measured[twin] = parity(twin)
            row |= measured[twin]
    rows = with_earlier(rows, args.out)
    if args.docs:
        write_table(rows)
    machine.report({"backbones": rows}, args.out)


def with_earlier(rows: dict[str, dict], out: pathlib.Path | None) -> dict[str, dict]:
    """Rows just measured and, of other backbones, those that `out` holds; in the order of `test_registry.PUBLISHED`."""
    rows = {name: row | {"git_revision": machine.describe()["git_revision"]} for name, row in rows.items()}
    if out is None or not out.is_file():
        return rows
    held = json_files.read_object(out, "results of an earlier run")
    known = {name: {"git_revision": held["machine"]["git_revision"]} | row for name, row in held["backbones"].items()}
    return {name: (known | rows)[name] for name in test_registry.PUBLISHED if name in known | rows}


def twin_of(name: str) -> str:
    """The backbone whose tiny twin is that of `name`, too."""
    config = families.tiny(name)
    return next(
        (other for other in (*families.COMPARED, *families.ENCODER_DECODER) if families.tiny(other) == config), name
    )


def static(name: str) -> dict[str, float | str]:
    """What needs no number of a model: coverage, size, memory."""
    config = registry.get(name)
    with torch.device("meta"):
        model = families.torch_model(config)
        tensors = families.published(model, dict(model.state_dict()))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(oracle.abstract(config), sep="/").items()}
    recipes = convert.plan(config.rules, {key: tuple(x.shape) for key, x in tensors.items()}, shapes, name=name)
    used = {tensor for recipe in recipes.values() for tensor in recipe.tensors}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    images, ids, mask = oracle.example(config, cameras=("static",))
    ids, mask = oracle.as_read(config, ids, mask)
    run = lambda p: base.build(config).apply({"params": p}, images, ids, mask, method="embed")  # noqa: E731
    tokens = jax.eval_shape(run, oracle.abstract(config))
    slots = tokens.slot("image").stop - tokens.slot("image").start
    if tokens.media is not None:  # the prompt is beside, too, where an encoder has read it
        slots = f"{tokens.media.mask.shape[1] - (0 if config.encoder is None else ids.shape[1])} beside"
    return {
        "family": config.model_type,
        "image_size": config.image.size,
        "tokens_per_image": slots,
        "parameters": count,
        "tensors": len(used),
        "tensors_ignored": len(tensors) - len(used),
        "parameters_filled": len(recipes) / len(shapes),
        "serving_gb": count * 2 / 1e9,
        "training_gb": count * 16 / 1e9,
    }


def parity(name: str) -> dict[str, float]:
    """Errors of the tiny twin, as tests/backbones/test_parity.py, or test_encoder_decoder.py, measures them."""
    with jax.default_matmul_precision("highest"):
        compare = test_parity if registry.get(name).encoder is None else test_encoder_decoder
        pair = compare.make_pair(families.tiny(name))
        return {
            "logits_error": compare.logits_error(pair, "right"),
            "gradient_error": compare.gradient_error(pair),
        }


def write_table(rows: dict[str, dict]) -> None:
    """Put the table between its marks in docs/backbones.md."""
    lines = [
        "| backbone | family | pixels | tokens per image | parameters | tensors read, ignored | logits | gradients "
        "| GB to serve | GB to train |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        errors = [f"{row[key]:.1e}" if key in row else "not measured" for key in ("logits_error", "gradient_error")]
        lines.append(
            f"| `{name}` | {row['family']} | {row['image_size']} | {row['tokens_per_image']} | "
            f"{row['parameters'] / 1e9:.3f} B | {row['tensors']}, {row['tensors_ignored']} | "
            f"{errors[0]} | {errors[1]} | {row['serving_gb']:.1f} | {row['training_gb']:.0f} |"
        )
    page = DOCS.read_text()
    table = "\n".join([BEGIN, *lines, END])
    DOCS.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, page, flags=re.DOTALL))


if __name__ == "__main__":
    main(cli.read(Args, description=__doc__))
