"""`features.json` of a TFDS directory as a flat list of fields, and the decoding of one record.

A record's keys are the paths of its fields, joined by "/": "steps/observation/image_0". Names may hold "/" themselves.
Under `steps` every field is stored flattened over time: floats as FloatList (float64 too), integers and booleans as
Int64List, images, strings and tensors with an encoding as one byte string per step. A sequence within a step takes two
keys: <path>/ragged_flat_values and <path>/ragged_row_lengths_0.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import posixpath
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import frame_index, records

STEPS = "steps"
IS_FIRST = "steps/is_first"
"""Every step has it, so its entries count the steps."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One leaf of the feature tree.

    path: its key in a record.
    kind: "image", "text", "tensor", or "unsupported" with the class in `dtype`.
    dtype: of the decoded values.
    shape: of one step's (or episode's) value; None where sizes vary. Of text: () for one, (n,) for n strings, (None,)
      for a list of any length.
    encoding: of tensors: "none", "zlib" or "bytes".
    per_step: whether it lies under `steps`.
    """

    path: str
    kind: Literal["image", "text", "tensor", "unsupported"]
    dtype: str
    shape: tuple[int | None, ...] = ()
    encoding: str = "none"
    per_step: bool = True

    @property
    def is_numeric(self) -> bool:
        """Numbers, however encoded."""
        return self.kind == "tensor" and self.dtype != "string"

    @property
    def size(self) -> int:
        """Numbers or strings per step (or episode). -1 where sizes vary."""
        return -1 if None in self.shape else math.prod(self.shape)

    @property
    def is_depth(self) -> bool:
        """Whether it is an image that holds distances rather than colours, by its numbers or its name."""
        return self.kind == "image" and (self.dtype != "uint8" or "depth" in self.path.lower())

    @property
    def is_picture(self) -> bool:
        """Colours or grey levels of one step that can be shown as RGB."""
        channels = self.shape[-1] if self.shape else None
        return self.kind == "image" and self.per_step and self.dtype == "uint8" and channels in (1, 3, 4, None)

    def __str__(self) -> str:
        shape = ", ".join("?" if n is None else str(n) for n in self.shape)
        kind = self.kind if self.kind in ("image", "text") else self.dtype
        kind = f"{self.dtype} image" if self.kind == "image" and self.dtype != "uint8" else kind
        return f"{kind}[{shape}]" + (f" ({self.encoding})" if self.encoding != "none" else "")


def read(text: str, name: str) -> dict[str, Field]:
    """Path -> field of a features.json. Raises ValueError naming the file and what is wrong."""
    try:
        tree = json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        hint = json_files.pointer_hint(name)
        raise ValueError(f"{name} is not JSON: {error}; copy the dataset's features.json again.{hint}") from error
    fields: dict[str, Field] = {}
    try:
        _walk(tree, (), False, fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a feature tree as TFDS writes it: {error!r}.") from error
    if not any(field.per_step for field in fields.values()):
        raise ValueError(f"{name} describes no `steps`; expected the features of RLDS episodes, it has {list(fields)}.")
    if IS_FIRST not in fields:
        raise ValueError(
            f"{name} has no {IS_FIRST}, by which steps are counted{_other_observation(fields)}; it has "
            f"{list(fields)}. RLDS (github.com/google-research/rlds) asks for it: add it in the dataset's builder."
        )
    return fields


def _other_observation(fields: Mapping[str, Field]) -> str:
    """Says so when nothing lies below steps/observation."""
    if any(path.startswith(f"{STEPS}/observation/") for path in fields):
        return ""
    pictures = [path for path, field in fields.items() if field.kind == "image"]
    return f", and no steps/observation; its images are {pictures}"


def locate(fields: Mapping[str, Field], name: str, below: str = STEPS) -> str:
    """The path that a description means by `name`: below `below` ("../" leads out of it), below `steps`, or whole.

    Where none of these is a field, the first of them, for a message.
    """
    candidates = [posixpath.normpath(f"{below}/{name}"), posixpath.normpath(f"{STEPS}/{name}"), name]
    return next((path for path in candidates if path in fields), candidates[0])


def _walk(node: Mapping[str, Any], path: tuple[str, ...], per_step: bool, out: dict[str, Field]) -> None:
    name = "/".join(path)
    cls = str(node.get("pythonClassName", "")).rpartition(".")[2]
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            _walk(child, (*path, key), per_step, out)
    elif "sequence" in node:
        if path == (STEPS,):
            _walk(node["sequence"]["feature"], path, True, out)
        elif _is_string(node["sequence"]["feature"]):
            length = int(node["sequence"].get("length") or -1)
            out[name] = Field(name, "text", "string", (length if length > 0 else None,), per_step=per_step)
        else:  # other sequences within an episode or a step have rows of unequal length; nothing of ours needs one
            out[name] = Field(name, "unsupported", cls or "Sequence", per_step=per_step)
    elif "image" in node:
        shape = _shape(node["image"])
        out[name] = Field(name, "image", node["image"].get("dtype", "uint8"), shape, per_step=per_step)
    elif "text" in node:
        out[name] = Field(name, "text", "string", per_step=per_step)
    elif "tensor" in node:
        tensor = node["tensor"]
        dtype = {"bool_": "bool", "object": "string"}.get(tensor["dtype"], tensor["dtype"])
        if dtype == "string" and len(_shape(tensor)) < 2:
            out[name] = Field(name, "text", "string", _shape(tensor), per_step=per_step)
            return
        if dtype != "string":
            np.dtype(dtype)
        encoding = str(tensor.get("encoding", "none")).lower()
        encoding = "none" if encoding in ("", "none") else encoding
        supported = encoding in ("none", "zlib", "bytes")
        kind = "tensor" if supported else "unsupported"
        out[name] = Field(name, kind, dtype if supported else f"{dtype} tensor", _shape(tensor), encoding, per_step)
    elif "classLabel" in node:
        out[name] = Field(name, "tensor", "int64", per_step=per_step)
    else:
        out[name] = Field(name, "unsupported", cls or "?", per_step=per_step)


def _is_string(node: Mapping[str, Any]) -> bool:
    """Whether a feature's node is one string."""
    tensor = node.get("tensor") or {}
    return "text" in node or (tensor.get("dtype") in ("string", "object") and not _shape(tensor))


def _shape(node: Mapping[str, Any]) -> tuple[int | None, ...]:
    sizes = [int(size) for size in (node.get("shape") or {}).get("dimensions", [])]
    return tuple(None if size < 0 else size for size in sizes)


class FieldError(ValueError):
    """A record does not hold what features.json says. Names the field, what was expected and what is there."""


def count_steps(payload: bytes, found: Mapping[str, records.Feature]) -> int:
    """T of an episode. Raises FieldError."""
    if IS_FIRST not in found:
        raise FieldError(f"the record has no {IS_FIRST}; it has {sorted(found)[:8]}")
    return len(records.ints_of(payload, found[IS_FIRST]))


def numbers(payload: bytes, found: Mapping[str, records.Feature], field: Field, count: int) -> np.ndarray:
    """dtype[count, *shape] of a numeric field. Raises FieldError."""
    feature = _feature(found, field)
    try:
        if field.encoding != "none":
            values = _encoded(records.strings_of(payload, feature), field)
        elif np.dtype(field.dtype).kind == "f":
            values = records.floats_of(payload, feature)
        else:
            values = records.ints_of(payload, feature)
    except (records.WireError, zlib.error) as error:
        raise FieldError(f"{field.path} {error}, as features.json says {field}") from error
    if field.size < 0:
        if field.shape.count(None) > 1 or count > 1:
            raise FieldError(f"{field.path} has sizes that vary, {field}, which is not supported")
        known = math.prod(n for n in field.shape if n is not None)
        if len(values.ravel()) % max(known, 1):
            raise FieldError(f"{field.path} has {values.size} values, expected a multiple of {known}")
        return values.reshape(count, *(-1 if n is None else n for n in field.shape)).astype(field.dtype)
    if values.size != count * field.size:
        per_step = f", that is {values.size // count} each" if count and values.size % count == 0 else ""
        raise FieldError(
            f"{field.path} has {values.size} values{per_step}, expected {count} x {field.size} as features.json says "
            f"{field}"
        )
    return values.reshape(count, *field.shape).astype(field.dtype)


def strings(payload: bytes, found: Mapping[str, records.Feature], field: Field, count: int) -> list[bytes]:
    """The byte strings of a text or image field, one per step. Raises FieldError."""
    values = _strings(payload, _feature(found, field), field)
    if len(values) != count:
        raise FieldError(f"{field.path} has {len(values)} entries, expected {count} as features.json says {field}")
    return values


def string_lists(
    payload: bytes, found: Mapping[str, records.Feature], field: Field, count: int
) -> list[tuple[bytes, ...]]:
    """The byte strings of a text field that has several per step (or episode), one tuple each. Raises FieldError."""
    ragged, rows = (f"{field.path}/ragged_{part}" for part in ("flat_values", "row_lengths_0"))
    if field.path not in found and ragged in found and rows in found:
        values = _strings(payload, found[ragged], field)
        try:
            lengths = records.ints_of(payload, found[rows]).tolist()
        except records.WireError as error:
            raise FieldError(f"{rows} {error}") from error
    else:
        values = _strings(payload, _feature(found, field), field)
        lengths = [len(values) if field.size < 0 and count == 1 else field.size] * count
    if len(lengths) != count or sum(lengths) != len(values) or min(lengths, default=0) < 0:
        raise FieldError(
            f"{field.path} has {len(values)} strings, expected those of {count} steps as features.json says {field}"
        )
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    return [tuple(values[first:last]) for first, last in itertools.pairwise(bounds)]


def _strings(payload: bytes, feature: records.Feature, field: Field) -> list[bytes]:
    try:
        return records.strings_of(payload, feature)
    except records.WireError as error:
        raise FieldError(f"{field.path} {error}, as features.json says {field}") from error


def decode(payload: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """All fields of one record: path -> array with a leading axis of steps where `per_step`.

    Images are uint8[..., height, width, channels] lists when frames differ in size; text is bytes, or tuples of bytes
    where their number varies. Raises FieldError.
    """
    found = records.features_of(payload)
    num_steps = count_steps(payload, found)
    out: dict[str, Any] = {}
    for field in fields.values():
        count = num_steps if field.per_step else 1
        if field.kind == "unsupported":
            continue
        if field.kind == "image":
            values: Any = [decode_any(data) for data in strings(payload, found, field, count)]
            if len({value.shape for value in values}) <= 1:
                values = np.stack(values) if values else np.zeros((0, 0, 0, 3), np.uint8)
        elif field.kind == "text" and not field.shape:
            values = np.array(strings(payload, found, field, count), object)
        elif field.kind == "text":
            values = string_lists(payload, found, field, count)
            if None not in field.shape:
                values = np.array([text for row in values for text in row], object).reshape(count, *field.shape)
        elif field.dtype == "string":
            feature = _feature(found, field)
            values = np.array(records.strings_of(payload, feature), object).reshape(count, *field.shape)
        else:
            values = numbers(payload, found, field, count)
        out[field.path] = values if field.per_step else values[0]
    return out


def decode_any(data: bytes) -> np.ndarray:
    """uint8[height, width, 3] of a JPEG or PNG of any size. Raises ValueError or OSError."""
    height, width = frame_index.image_size(data)
    out = np.empty((height, width, 3), np.uint8)
    frame_index.decode_image(data, out)
    return out


def _feature(found: Mapping[str, records.Feature], field: Field) -> records.Feature:
    if field.path not in found:
        near = difflib.get_close_matches(field.path, found, n=1)
        raise FieldError(
            f"the record has no {field.path}, which features.json says is {field}"
            + (f" (it has {near[0]})" if near else f" (it has {sorted(found)[:12]})")
        )
    return found[field.path]


def _encoded(values: Sequence[bytes], field: Field) -> np.ndarray:
    dtype = np.dtype(field.dtype).newbyteorder("<")
    if field.encoding == "zlib":
        values = [zlib.decompress(value) for value in values]
    try:
        return np.concatenate([np.zeros(0, dtype), *(np.frombuffer(value, dtype) for value in values)])
    except ValueError as error:
        raise FieldError(f"{field.path} holds {field.encoding} bytes that are no {field.dtype}: {error}") from error
