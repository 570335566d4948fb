"""Pictures that cannot be decoded are named when a collection is opened, in all three formats."""

from __future__ import annotations

import io
import json
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from robovlms_jax.data.vl import opening, pictures, samples
from robovlms_jax.data.vl.config import VLConfig
from tests.data import test_vl as written

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(PIXELS).save(data, kind)
    return data.getvalue()


DEEP = io.BytesIO()
Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256).save(DEEP, "PNG")
FINE = {kind: encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")}
FINE |= {"JPEG with bytes behind it": FINE["JPEG"] + b"made by a camera"}
BROKEN = {f"half a {kind}": data[: len(data) // 2] for kind, data in FINE.items() if kind in ("JPEG", "PNG", "BMP")}
BROKEN |= {
    "half a WEBP": FINE["WEBP"][:-7],
    "no picture": b"<html>404</html>",
    "nothing": b"",
    "depth": DEEP.getvalue(),
}


def stored(folder: pathlib.Path, form: str, found: dict[str, bytes]) -> str:
    """A collection with one question about each of the pictures; its path."""
    if form == "tar":
        members = {name: data for key, data in found.items() for name, data in ((key, data), (f"{key[0]}.txt", b"it"))}
        return written.tar(folder / "x.tar", members)
    for name, data in found.items():
        (folder / name).write_bytes(data)
    if form == "llava":
        entries = [written.entry(0, [name], "<image>\nWhat?", "it") for name in found]
        return written.llava(folder, entries)
    values = {"images": [{"id": name, "file_name": name} for name in found]}
    values["annotations"] = [{"image_id": name, "caption": "it"} for name in found]
    (folder / "captions.json").write_text(json.dumps(values))
    return str(folder / "captions.json")


def opened(path: str, share: float):
    config = VLConfig(paths={"web": path}, turns="each")
    return opening.open_all(config, config.paths, share)["web"]


@pytest.mark.parametrize("form", ["tar", "llava", "coco"])
def test_a_picture_that_was_cut_off_is_named_with_its_place_before_anything_is_learned(tmp_path, form, caplog):
    path = stored(tmp_path, form, {"a.jpg": FINE["JPEG"], "b.jpg": FINE["JPEG"][:-40], "c.png": FINE["PNG"]})
    place = rf"b\.jpg in {tmp_path}/x\.tar" if form == "tar" else rf"{tmp_path}/b\.jpg"
    with pytest.raises(
        ValueError, match=rf"source 'web': .*: 1 of 3 pictures cannot be decoded, among them {place} \("
    ):
        opened(path, 0.3)
    with caplog.at_level(logging.WARNING):
        pairs = opened(path, 0.34)
    assert "1 of 3 pictures" in caplog.text and "take the samples out" in caplog.text and len(pairs) == 3


@pytest.mark.parametrize("kind", [*FINE, *BROKEN])
def test_what_is_said_of_a_picture_is_what_reading_it_says(tmp_path, kind):
    data = (FINE | BROKEN)[kind]
    pairs = opening.open_pairs(stored(tmp_path, "tar", {"a.png": data}))
    if kind in FINE:
        assert pictures.decode(data).shape == PIXELS.shape
        pictures.require_readable(pairs, 0.0)
    else:
        with pytest.raises((ValueError, OSError, SyntaxError)):
            pictures.decode(data)
        with pytest.raises(ValueError, match="1 of 1 pictures cannot be decoded"):
            pictures.require_readable(pairs, 0.0)


def test_pictures_that_end_well_are_not_read_whole(tmp_path, monkeypatch):
    pairs = opening.open_pairs(stored(tmp_path, "tar", {"a.jpg": FINE["JPEG"], "b.png": FINE["PNG"]}))
    read = []
    monkeypatch.setattr(type(pairs), "picture", lambda *which: read.append(which))
    pictures.require_readable(pairs, 0.0)
    assert not read


def test_damage_in_the_middle_is_told_with_member_and_tar_when_it_is_read(tmp_path, caplog):
    whole = FINE["PNG"]
    torn = whole[:60] + bytes(len(whole) - 80) + whole[-20:]
    pairs = opened(stored(tmp_path, "tar", {"a.png": FINE["PNG"], "b.png": torn}), 0.0)
    encode = written.conversations.encoder(_tokenizer(tmp_path), "kosmos-2", written.TOKENS)
    batch = samples.PairSource(pairs, encode, written.IMAGE).training_batch(np.array([1]), np.zeros(1, np.uint32))
    assert batch.corrupt.tolist() == [1]
    assert f"b.png in {tmp_path}/x.tar cannot be read: " in caplog.text and "Get it anew, or take" in caplog.text


def _tokenizer(folder: pathlib.Path):
    written.tokenizers.make_twin_tokenizer(["what is it"], 400, folder / "words")
    return written.tokenizers.load_tokenizer(folder / "words")
