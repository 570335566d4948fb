"""Write RLDS directories that TFDS, and `rlds`, open, without TensorFlow.

Shards as TFRecord or ArrayRecord, features.json, dataset_info.json; citations and checksums of downloads are left out.
"""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.data import features, records

_CLASSES = {
    "image": "tensorflow_datasets.core.features.image_feature.Image",
    "text": "tensorflow_datasets.core.features.text_feature.Text",
    "tensor": "tensorflow_datasets.core.features.tensor_feature.Tensor",
    "texts": "tensorflow_datasets.core.features.sequence_feature.Sequence",
    "dict": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "steps": "tensorflow_datasets.core.features.dataset_feature.Dataset",
}

Values = Sequence[bytes] | np.ndarray


def write(
    directory: str | os.PathLike[str],
    name: str,
    fields: Sequence[features.Field],
    splits: Mapping[str, Iterable[Mapping[str, Values]]],
    *,
    version: str = "1.0.0",
    file_format: Literal["tfrecord", "array_record"] = "tfrecord",
    shard_bytes: int = 256 << 20,
) -> pathlib.Path:
    """Write a dataset; returns <directory>/<name>/<version>. dataset_info.json, written last, marks it as complete.

    Args:
      fields: of every episode; paths as in `features.Field`.
      splits: name -> episodes, each path -> encoded images or texts as bytes (lists of texts where the field has
        several per step), or dtype[T, *shape] numbers. Fields that are not `per_step` have a leading axis of one.
      shard_bytes: a shard is closed once it holds as much.
    Raises:
      ValueError: the place is taken, or an episode lacks a field.
    """
    target = pathlib.Path(directory) / name / version
    if (target / "dataset_info.json").exists():
        raise ValueError(f"{target} already holds a dataset; choose another directory or delete it.")
    target.mkdir(parents=True, exist_ok=True)
    described = []
    for split, episodes in splits.items():
        lengths, total = _write_split(target, name, split, fields, episodes, file_format, shard_bytes)
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(total),
                "shardLengths": [str(length) for length in lengths],
            }
        )
    atomic.write_json(target / "features.json", features_json(fields))
    atomic.write_json(
        target / "dataset_info.json",
        {"fileFormat": file_format, "name": name, "version": version, "splits": described},
    )
    return target


def encode_example(fields: Sequence[features.Field], episode: Mapping[str, Values]) -> bytes:
    """A `tf.train.Example` of one episode. Raises ValueError naming a field that is missing."""
    entries = []
    for field in sorted(fields, key=lambda field: field.path):
        if field.path not in episode:
            raise ValueError(f"an episode lacks {field.path}; it has {sorted(episode)}.")
        values = episode[field.path]
        if field.kind == "text" and field.shape == (None,) and field.per_step:
            flat, rows = (f"{field.path}/ragged_{part}" for part in ("flat_values", "row_lengths_0"))
            texts = _tagged(1, b"".join(_tagged(1, text) for row in values for text in row))
            lengths = _tagged(3, _tagged(1, b"".join(_varint(len(row)) for row in values)))
            entries += [
                _tagged(1, _tagged(1, key.encode()) + _tagged(2, part))
                for key, part in ((flat, texts), (rows, lengths))
            ]
            continue
        if field.kind == "text" and field.shape:
            content = _tagged(1, b"".join(_tagged(1, text) for row in values for text in row))
        elif field.kind in ("image", "text"):
            content = _tagged(1, b"".join(_tagged(1, value) for value in values))
        elif field.encoding != "none":
            raw = [np.ascontiguousarray(value, np.dtype(field.dtype)).tobytes() for value in values]
            raw = [zlib.compress(value) for value in raw] if field.encoding == "zlib" else raw
            content = _tagged(1, b"".join(_tagged(1, value) for value in raw))
        elif np.dtype(field.dtype).kind == "f":
            packed = np.ascontiguousarray(values, "<f4").tobytes()
            content = _tagged(2, _tagged(1, packed) if packed else b"")
        else:
            packed = b"".join(map(_varint, np.asarray(values).astype(np.int64).ravel().view(np.uint64).tolist()))
            content = _tagged(3, _tagged(1, packed) if packed else b"")
        entries.append(_tagged(1, _tagged(1, field.path.encode()) + _tagged(2, content)))
    return _tagged(1, b"".join(entries))


def features_json(fields: Sequence[features.Field]) -> dict[str, Any]:
    """The feature tree as TFDS writes it."""
    tree: dict[str, Any] = {}
    for field in fields:
        node = tree
        parts = field.path.split("/")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = field
    return _node(tree, top=True)


def _node(tree: Any, *, top: bool = False) -> dict[str, Any]:
    if isinstance(tree, features.Field):
        shape = {"dimensions": [str(-1 if size is None else size) for size in tree.shape]}
        kind = tree.kind
        if kind == "text" and tree.shape:
            kind = "texts" if tree.shape == (None,) else "tensor"
        content = {
            "image": {"image": {"shape": shape, "dtype": tree.dtype, "encodingFormat": "jpeg"}},
            "text": {"text": {}},
            "texts": {"sequence": {"feature": {"pythonClassName": _CLASSES["text"], "text": {}}, "length": "-1"}},
            "tensor": {"tensor": {"shape": shape, "dtype": tree.dtype, "encoding": tree.encoding}},
        }[kind]
        return {"pythonClassName": _CLASSES[kind], **content}
    children = {}
    for name, child in tree.items():
        children[name] = _node(child)
        if top and name == features.STEPS:
            children[name] = {
                "pythonClassName": _CLASSES["steps"],
                "sequence": {"feature": children[name], "length": "-1"},
            }
    return {"pythonClassName": _CLASSES["dict"], "featuresDict": {"features": children}}


def _write_split(
    target: pathlib.Path,
    name: str,
    split: str,
    fields: Sequence[features.Field],
    episodes: Iterable[Mapping[str, Values]],
    file_format: str,
    shard_bytes: int,
) -> tuple[list[int], int]:
    """(episodes per shard, bytes of payload). Names hold the number of shards, so files are renamed at the end."""
    lengths: list[int] = []
    temporary: list[pathlib.Path] = []
    writer, size, total = None, 0, 0
    for episode in episodes:
        payload = encode_example(fields, episode)
        if writer is None or size >= shard_bytes:
            if writer is not None:
                writer.close()
            temporary.append(target / f"{name}-{split}.{file_format}-{len(temporary):05d}.partial")
            writer, size = _RECORD_WRITERS[file_format](temporary[-1]), 0
            lengths.append(0)
        writer.write(payload)
        lengths[-1] += 1
        size += len(payload)
        total += len(payload)
    if writer is not None:
        writer.close()
    for number, path in enumerate(temporary):
        os.replace(path, target / f"{name}-{split}.{file_format}-{number:05d}-of-{len(temporary):05d}")
    return lengths, total


class _TFRecordWriter:
    def __init__(self, path: pathlib.Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()

    def write(self, payload: bytes) -> None:
        self._file.write(records.frame(payload))

    def close(self) -> None:
        self._file.close()


def _array_record_writer(path: pathlib.Path) -> Any:
    from array_record.python import array_record_module

    # Compressed JPEG is no smaller; a group of one record makes every record a seek away.
    return array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")


_RECORD_WRITERS = {"tfrecord": _TFRecordWriter, "array_record": _array_record_writer}


def _tagged(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
