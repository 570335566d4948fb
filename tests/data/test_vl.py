"""Pictures with text: three file formats read alike, faults named, batches that can be gone on with."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pathlib
import pickle
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from robovlms_jax.data import notices, sources
from robovlms_jax.data.vl import base, opening, samples
from robovlms_jax.data.vl.config import VLConfig
from robovlms_jax.inputs import conversations, tokenizers
from robovlms_jax.inputs.conversations import Turn
from robovlms_jax.inputs.images import ImageSpec

IMAGE = ImageSpec(16, (0.5,) * 3, (0.5,) * 3, "bilinear")
TOKENS = 3  # of a picture


def png(level: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), level, np.uint8)).save(data, "PNG")
    return data.getvalue()


def entry(number: int, pictures: list[str], *said: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": number, "image": pictures, "conversations": turns}


ENTRIES = [
    entry(0, ["a.png"], "<image>\nWhat colour?", "grey", "And how big?", "small"),
    entry(1, ["a.png", "b.png"], "<image>\n<image>\nWhich is brighter?", "the second"),
    entry(2, [], "What is a robot?", "a machine"),
]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, level in (("a.png", 40), ("b.png", 200)):
        (tmp_path / name).write_bytes(png(level))
    return tmp_path


@pytest.fixture(scope="module")
def encode(tmp_path_factory) -> conversations.Encoder:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizers.make_twin_tokenizer(["what colour is it", "grey small the second"], 400, directory)
    return conversations.encoder(tokenizers.load_tokenizer(directory), "kosmos-2", TOKENS)


def llava(folder: pathlib.Path, entries: list[dict], name: str = "set.json") -> str:
    text = json.dumps(entries) if name.endswith(".json") else "\n".join(map(json.dumps, entries))
    (folder / name).write_text(text)
    return str(folder / name)


def tar(path: pathlib.Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return str(path)


def source(pairs: base.Pairs, encode: conversations.Encoder, **settings) -> samples.PairSource:
    return samples.PairSource(pairs, encode, IMAGE, **settings)


def said(encode: conversations.Encoder, batch, row: int) -> str:
    slots = batch.answer_slots[row][batch.answer_mask[row]]
    return encode.tokenizer.decode(batch.text_ids[row][slots]).strip()


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_llavas_conversations_are_read_with_all_their_pictures(folder, encode, name):
    pairs = opening.open_pairs(llava(folder, ENTRIES, name))
    found = source(pairs, encode)
    batch = found.evaluation_batch(np.arange(3))
    assert [said(encode, batch, row) for row in range(3)] == ["grey</s> small</s>", "the second</s>", "a machine</s>"]
    assert batch.images.shape == (3, 2, 16, 16, 3)
    assert batch.images[1, 0].max() == 40 and batch.images[1, 1].min() == 200 and batch.images[2].max() == 0
    shown = [sorted(set(row[row >= 0].tolist())) for row in batch.image_slots]
    assert shown == [list(range(TOKENS)), list(range(2 * TOKENS)), []]
    assert found.describe(1) == f"{folder / name}, entry 2 (id 1)"


def test_every_question_may_be_a_sample_of_its_own(folder, encode):
    path = llava(folder, ENTRIES)
    config = VLConfig(paths={"set": path}, turns="each")
    found = source(opening.open_all(config, config.paths)["set"], encode)
    batch = found.evaluation_batch(np.arange(4))
    assert [said(encode, batch, row) for row in range(2)] == ["grey</s>", "small</s>"]
    assert (batch.image_slots[1] >= 0).sum() == TOKENS  # the second question sees the picture, too


def test_messages_with_roles_and_a_lacking_mark_are_understood(folder):
    spoken = [{"role": "system", "content": "x"}, {"role": "user", "content": "What?"}]
    spoken.append({"role": "assistant", "content": "grey"})
    pairs = opening.open_pairs(llava(folder, [{"image": "a.png", "messages": spoken}]))
    assert pairs.sample(0) == base.Sample(("a.png",), ((Turn("<image>\nWhat?", "grey"),),))


def test_captions_of_a_picture_are_drawn_one_at_a_time(folder, encode):
    notes = [{"image_id": 7, "caption": text} for text in ("grey", "dull", " ")]
    values = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}], "annotations": notes}
    (folder / "captions.json").write_text(json.dumps(values))
    found = source(opening.open_pairs(str(folder / "captions.json")), encode)
    assert len(found) == 1
    batch = found.training_batch(np.zeros(4, int), np.arange(4, dtype=np.uint32))
    assert [said(encode, batch, row) for row in range(4)] == ["grey</s>", "dull</s>"] * 2


def test_a_caption_that_is_no_text_is_named(folder):
    values = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "caption": None}]}
    (folder / "captions.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"captions\.json: a caption is None; expected text"):
        opening.open_pairs(str(folder / "captions.json"))


def test_tar_shards_are_read_at_random(folder, encode):
    for shard in range(2):
        members = {f"{shard}7.jpg": png(10 + shard), f"{shard}7.txt": b"grey", f"{shard}8.0.png": png(20)}
        members |= {f"{shard}8.1.png": png(30), f"{shard}8.json": json.dumps(ENTRIES[1]).encode()}
        tar(folder / f"part-00{shard}.tar", members)
    pairs = pickle.loads(pickle.dumps(opening.open_pairs(str(folder / "part-{000..001}.tar"))))  # as workers get it
    assert len(pairs) == 4
    batch = source(pairs, encode).evaluation_batch(np.array([3, 0, 2]))
    assert [said(encode, batch, row) for row in range(3)] == ["the second</s>", "grey</s>", "grey</s>"]
    assert [int(batch.images[row, 0].max()) for row in range(3)] == [20, 10, 11]
    assert len(opening.open_pairs(str(folder))) == 4


def test_pictures_of_a_tars_sample_come_in_the_order_of_their_numbers(folder):
    members = {f"7.{number}.png": png(number) for number in range(12)}
    talk = entry(0, [], "<image>\n" * 12 + "How many?", "twelve")
    path = tar(folder / "x.tar", members | {"7.json": json.dumps(talk).encode()})
    assert opening.open_pairs(path).sample(0).pictures == tuple(members)


BAD = {
    "a missing picture": ([entry(0, ["gone.png"], "<image>\nq", "a")], "1 of 1 pictures are missing, among them gone"),
    "marks": ([entry(0, ["a.png", "b.png"], "<image>\nq", "a")], "entry 1: 1 marks <image> in the questions for 2"),
    "turns": ([entry(0, [], "q", "a", "q")], "entry 1: turns must alternate"),
    "nothing": ([], "run dry"),
    "a video": ([{"video": "x.mp4"}], "is about a video"),
    "no conversation": ([{"id": 3, "text": "x"}], "`conversations`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_means_nothing_is_named(folder, case):
    entries, message = BAD[case]
    with pytest.raises((ValueError, OSError), match=message):
        opening.open_pairs(llava(folder, entries))


def test_text_in_another_encoding_is_named_with_its_source_and_file(folder):
    text = json.dumps(ENTRIES[0], ensure_ascii=False).replace("grey", "gr\xe4y").encode("latin-1")
    (folder / "x.jsonl").write_bytes(json.dumps(ENTRIES[1]).encode() + b"\n" + text)
    with pytest.raises(ValueError, match=r"source 'web': .*x\.jsonl, line 2 is no JSON in UTF-8"):
        opening.open_all(VLConfig(paths={"web": "x"}), {"web": str(folder / "x.jsonl")})
    path = tar(folder / "x.tar", {"1.jpg": png(1), "1.txt": b"gr\xe4y"})
    with pytest.raises(ValueError, match=r"source 'web': .*x\.tar, sample '1': 1\.txt is no text in UTF-8"):
        opening.open_all(VLConfig(paths={"web": "x"}), {"web": path})


@pytest.mark.parametrize(
    "fails", [lambda: b"\xff".decode(), lambda: json.loads("{"), lambda: pathlib.Path("/nowhere").read_text()]
)
def test_an_error_of_any_making_is_told_with_its_source(fails):
    with pytest.raises((ValueError, OSError)) as caught:
        fails()
    found = notices.about("source 'web'", caught.value)
    assert isinstance(found, ValueError | FileNotFoundError) and str(found).startswith("source 'web': ")


def test_pictures_missing_from_a_tar_are_counted_and_named(folder):
    path = tar(folder / "x.tar", {"1.jpg": png(1), "1.txt": b"grey", "2.txt": b"lost", "3.txt": b"lost"})
    with pytest.raises(FileNotFoundError, match=r"source 'web': .*2 of 3 pictures are missing, among them 2 in x.tar"):
        opening.open_all(VLConfig(paths={"web": path}), {"web": path})


def test_a_caption_lies_beside_metadata_without_one_and_is_text(folder):
    members = {"1.jpg": png(1), "1.json": b'{"caption": null, "width": 3}', "1.txt": b"grey"}
    (pairs,) = [opening.open_pairs(tar(folder / "x.tar", members))]
    assert pairs.sample(0).choices[0][0].answer == "grey"
    for content, message in (
        (b'{"caption": 3}', "has caption=3; expected text"),
        (b"[]", "is a list; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            opening.open_pairs(tar(folder / "x.tar", {"1.jpg": png(1), "1.json": content}))


def test_a_tar_may_hold_conversations_without_pictures_and_keys_that_begin_anew(folder):
    talk = json.dumps({"conversations": entry(0, [], "What?", "grey")["conversations"]}).encode()
    for shard in range(2):
        tar(folder / f"{shard}.tar", {"1.json": talk, "2.jpg": png(10 + shard), "2.txt": b"grey"})
    pairs = opening.open_pairs(str(folder / "{0..1}.tar"))
    assert [len(pairs.sample(i).pictures) for i in range(4)] == [0, 1, 0, 1]
    assert pairs.picture(pairs.sample(1).pictures[0]) == png(10)
    assert pairs.picture(pairs.sample(3).pictures[0]) == png(11)
    shown = json.dumps({"conversations": entry(0, [], "<image>\nWhat?", "grey")["conversations"]}).encode()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 pictures are missing, among them 1 in x\.tar"):
        opening.open_pairs(tar(folder / "x.tar", {"1.json": shown}))


@pytest.mark.parametrize(("image", "fits"), [(None, True), ("", False), (".", False), ([None], False)])
def test_a_picture_that_is_none_is_text_alone_and_one_that_is_a_folder_is_missing(folder, image, fits):
    values = {**entry(0, [], "What?", "grey"), "image": image}
    if fits:
        assert opening.open_pairs(llava(folder, [values])).sample(0).pictures == ()
    else:
        with pytest.raises((ValueError, OSError), match=r"image=|1 of 1 pictures are missing"):
            opening.open_pairs(llava(folder, [values]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images=None; expected a list"),
        ({"images": [{"id": 7, "file_name": 3}]}, "has id 7 and file_name 3"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]}, "id 7 is both a.png and b"),
        ({"annotations": [{"image_id": [7], "caption": "grey"}]}, r"does not list: \[7\]"),
    ],
)
def test_what_coco_must_not_hold_is_named(folder, changes, message):
    values = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "caption": "grey"}]}
    (folder / "captions.json").write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=message):
        opening.open_pairs(str(folder / "captions.json"))


@pytest.mark.parametrize("cut", [2048, 2148, 4096, 4607])
def test_a_shard_that_ends_anywhere_before_its_end_is_refused(folder, cut):
    members = {f"{i}.{kind}": data for i in range(5) for kind, data in (("jpg", png(1)), ("txt", b"grey"))}
    path = pathlib.Path(tar(folder / "x.tar", members))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"x\.tar.* is cut off"):
        opening.open_pairs(str(path))
    path.write_bytes(whole[:2048] + bytes(512) + whole[2560:])
    with pytest.raises(ValueError, match=r"x\.tar is damaged: byte 2,048"):
        opening.open_pairs(str(path))


def test_a_folder_of_pictures_for_shards_and_a_compressed_shard_are_refused_with_what_helps(folder):
    path = tar(folder / "x.tar", {"1.jpg": png(1), "1.txt": b"grey"})
    with pytest.raises(ValueError, match=r"data\.vl\.images='y' has no effect"):
        opening.open_pairs(path, "y")
    pathlib.Path(path).rename(folder / "x.tar.gz")
    with pytest.raises(ValueError, match="unpack the compression once"):
        opening.open_pairs(str(folder / "x.tar.gz"))


def test_shards_that_are_cut_off_compressed_or_absent_are_named(folder):
    path = pathlib.Path(tar(folder / "x.tar", {"1.txt": b"grey", "1.jpg": png(1) * 40}))
    whole = path.read_bytes()
    path.write_bytes(whole[:1600])
    with pytest.raises(ValueError, match=r"x\.tar"):
        opening.open_pairs(str(path))
    path.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(ValueError, match="no plain tar"):
        opening.open_pairs(str(path))
    with pytest.raises(FileNotFoundError, match="3 of 3 shards"):
        opening.open_pairs(str(folder / "{0..2}.tar"))


def test_conversations_longer_than_the_context_are_refused_or_left_out(folder, encode):
    long = entry(3, [], "q", "word " * 90)
    pairs = opening.open_pairs(llava(folder, [*ENTRIES, long]))
    with pytest.raises(ValueError, match=r"1 of 4 conversations have more than data.vl.length=64 .*entry 4 \(id 3\)"):
        source(pairs, encode, length=64)
    found = source(pairs, encode, length=64, leave_out_long=True)
    assert len(found) == 3 and found.evaluation_batch(np.array([0])).text_ids.shape == (1, 64)
    with pytest.raises(ValueError, match="run dry"):
        source(pairs, encode, length=4, leave_out_long=True)


def test_a_picture_that_cannot_be_decoded_is_replaced_and_reported(folder, encode):
    (folder / "a.png").write_bytes(b"no picture")
    found = source(opening.open_pairs(llava(folder, ENTRIES)), encode)
    batch = found.training_batch(np.array([0, 2]), np.zeros(2, np.uint32))
    assert batch.corrupt.tolist() == [0, -1] and batch.episode.tolist() == [2, 2]
    assert found.evaluation_batch(np.array([0])).answer_mask.sum() == 0


READING = {"num_threads": 1, "prefetch": 1}


def drawn(found, count, **changes):
    with contextlib.closing(sources.train_batches({"set": found}, {"set": 2}, seed=3, **READING, **changes)) as batches:
        return [batch["set"] for batch in itertools.islice(batches, count)]


def test_batches_go_on_where_they_were_and_are_shared_over_hosts(folder, encode):
    found = source(opening.open_pairs(llava(folder, ENTRIES)), encode)
    whole = drawn(found, 4)
    jax.tree.map(np.testing.assert_array_equal, drawn(found, 2, start_step=2), whole[2:])
    parts = [drawn(found, 4, process=(host, 2)) for host in range(2)]
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *step) for step in zip(*parts, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_other_texts_are_another_order(folder, encode):
    first = source(opening.open_pairs(llava(folder, ENTRIES)), encode)
    other = source(opening.open_pairs(llava(folder, [*ENTRIES[:2], entry(2, [], "What?", "a table")])), encode)
    now = sources.fingerprints({"set": first}, {"set": 2}, 3)
    with pytest.raises(ValueError, match="samples was '3 with sha256"):
        sources.require_same_order(now, sources.fingerprints({"set": other}, {"set": 2}, 3))


def test_special_tokens_that_a_file_writes_out_are_told_with_the_entry(folder, encode, caplog):
    odd = [entry(8, [], "What ends a sentence?", "</s> does"), entry(9, [], "And <s>, </s>?", "also"), *ENTRIES]
    source(opening.open_pairs(llava(folder, odd)), encode)
    assert "2 conversations write out </s>" in caplog.text and "entry 1 (id 8)" in caplog.text
    assert "1 conversations write out <s>" in caplog.text  # beside another in the same one
    caplog.clear()
    source(opening.open_pairs(llava(folder, ENTRIES)), encode)
    assert "write out" not in caplog.text
