"""RLDS datasets as other people write them: a few fields, each replaced at will."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from robovlms_jax.data import rlds, rlds_writer
from robovlms_jax.data.features import Field
from tests.data import toy_rlds

T = 8


def picture(seed: int = 0, *, form: str = "PNG", mode: str = "RGB", size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(toy_rlds.image(seed, size)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def open_written(directory, changes=None, *, given=None, split="training", episodes=6, name="mine", **options):
    """Write episodes of an action, a state, an image and a text, with fields replaced (None: left out) by `changes`,
    path -> (field, number of the episode -> values), and open them."""
    rng = np.random.default_rng(0)
    action = lambda e: np.c_[rng.uniform(-0.05, 0.05, (T, 6)), np.arange(T) > 3]  # noqa: E731
    described = {
        "steps/is_first": (Field("", "tensor", "bool"), lambda e: np.arange(T) == 0),
        "steps/action": (Field("", "tensor", "float32", (7,)), action),
        "steps/observation/image": (Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T),
        "steps/language_instruction": (Field("", "text", "string"), lambda e: [b"lift it"] * T),
        **(changes or {}),
    }
    described = {path: content for path, content in described.items() if content}
    fields = [
        Field(path, f.kind, f.dtype, f.shape, f.encoding, path.startswith("steps/"))
        for path, (f, _) in described.items()
    ]
    records = [{path: values(e) for path, (_, values) in described.items()} for e in range(episodes)]
    rlds_writer.write(directory, name, fields, {"train": records})
    return rlds.open_dataset(directory, given or {}, split, name=name, options=rlds.Options(**options))


def numbers(size: int, values=None):
    return Field("", "tensor", "float32", (size,)), values or (lambda e: np.full((T, size), 0.01, np.float32))


def text(*shape, values):
    return Field("", "text", "string", shape), values
