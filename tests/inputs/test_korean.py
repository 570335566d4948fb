"""Korean instructions through the kinds of tokenizers that the backbones have.

Published vocabularies are too large for a repository, so each kind is made small: what keeps Hangul whole or loses it
is the kind (bytes, byte fallback, pieces alone), not the size.
"""

from __future__ import annotations

import base64
import itertools
import logging
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.backbones import registry
from robovlms_jax.driving import instructions, scenarios
from robovlms_jax.inputs import prompts, tokenizers

NAMES = list(scenarios.SCENARIOS)
SENTENCES = [
    x
    for name in NAMES
    for held in (False, True)
    for x in instructions.wordings(name, held_out=held)[:: 40 if held else 120]
]
ENGLISH = ["open the drawer", "move the slider to the left", "An image of a robot push the red block into the drawer"]

KINDS = {
    "kosmos-2": "pieces",
    "qwen": "ranks",
    **dict.fromkeys(("gemma3", "instructblip", "llava", "otter", "paligemma"), "fallback"),
    **dict.fromkeys(("blip-2", "deepseek_vl", "flamingo", "florence2", "idefics3", "internvl"), "bytes"),
    **dict.fromkeys(("janus", "llava_mpt", "moondream1", "qwen2_5_vl", "qwen3_vl", "smolvlm", "vlm"), "bytes"),
}
"""Family -> kind of its published tokenizer: bytes (byte-level BPE), ranks (the same, as Qwen's file), fallback
(SentencePiece whose unknown letters become bytes), pieces (SentencePiece without that: unknown letters are <unk>).
Otter's is that of its LLaMA form; its MPT form has bytes. InstructBLIP's that of Vicuna, BLIP-2's that of OPT; with
FLAN-T5 both have pieces."""


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ENGLISH, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def fallback(byte_fallback=True):
    """SentencePiece's way in `tokenizers`: spaces are letters, all English letters are known, Hangul is not."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [*sorted(set("".join(ENGLISH)) - {" "}), "▁"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256 if byte_fallback else 0)), *letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def ranks(path):
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    lines += [base64.b64encode(pair) + b" %d" % (256 + i) for i, pair in enumerate((b"th", b"he", b"\xeb\xb0"))]
    (path / tokenizers.RANKS).write_bytes(b"\n".join(lines) + b"\n")
    return tokenizers.load_tokenizer(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    twin = tmp_path_factory.mktemp("twin")
    tokenizers.make_twin_tokenizer([*ENGLISH, *SENTENCES[:8]], 400, twin)
    return {
        "bytes": byte_level(),
        "fallback": fallback(),
        "pieces": fallback(byte_fallback=False),
        "ranks": ranks(tmp_path_factory.mktemp("ranks")),
        "twin": tokenizers.load_tokenizer(twin),
    }


FAMILIES = {registry.to_hf_config(registry.get(name))["model_type"]: name for name in registry.names()}
"""Family -> a backbone of it."""


def test_every_family_of_backbones_is_of_a_known_kind():
    new = sorted(set(FAMILIES) - set(KINDS))
    assert not new, f"say in KINDS of which kind the tokenizers of {new} are, as published"


def encoded(tokenizer, sentence):
    ids, mask = prompts.encode(tokenizer, "{instruction}", sentence, 256)
    return ids[mask].tolist()


@pytest.mark.parametrize("kind", sorted({*KINDS.values(), "twin"} - {"pieces"}))
def test_korean_survives_there_and_back_and_no_two_instructions_are_the_same_tokens(made, kind):
    tokenizer = made[kind]
    found = {}
    for sentence in SENTENCES:
        ids = encoded(tokenizer, sentence)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == sentence
        assert found.setdefault(tuple(ids), sentence) == sentence


@pytest.mark.parametrize("family", sorted(KINDS))
def test_every_family_reads_korean_or_says_that_it_cannot(made, family):
    tokenizer, prompt = made[KINDS[family]], registry.get(FAMILIES[family]).prompt
    length = 256
    if KINDS[family] != "pieces":
        left, right = (
            prompts.encode(tokenizer, prompt, instructions.CANONICAL[f"1box_vert_{s}"], length)
            for s in ("left", "right")
        )
        assert (left[0] != right[0]).any()
        return
    with pytest.raises(ValueError, match="does not know 16 of the 16 letters of the instruction '박스를 왼쪽으로"):
        prompts.encode(tokenizer, prompt, instructions.CANONICAL["1box_vert_left"], length)


def test_a_tokenizer_without_bytes_would_have_made_left_and_right_the_same(made):
    """What the refusal prevents: these two differ in one word, and the tokens do not."""
    left, right = ("박스를 왼편으로 돌아서", "박스를 우측으로 돌아서")
    assert made["pieces"](left)["input_ids"] == made["pieces"](right)["input_ids"]


def test_an_odd_letter_in_a_known_script_is_said_once_and_read(made, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ids = encoded(made["pieces"], "open the drawer ß")
    assert made["pieces"].unk_token_id in ids
    assert [record.message for record in caplog.records] == [
        "the tokenizer does not know ß of 'open the drawer ß'; the rest is read"
    ]


def test_odd_letters_that_a_server_is_sent_for_ever_are_not_remembered_for_ever(made, monkeypatch):
    monkeypatch.setattr(prompts, "_SAID", set())
    monkeypatch.setattr(prompts, "MOST_SAID", 2)
    for letter in "ßøåþ":
        encoded(made["pieces"], f"open the drawer {letter}")
    assert len(prompts._SAID) == 2


@pytest.mark.parametrize("kind", ["bytes", "fallback", "ranks", "twin"])
def test_decomposed_hangul_is_the_same_instruction(made, kind):
    for sentence in SENTENCES[:5]:
        apart = unicodedata.normalize("NFD", sentence)
        assert apart != sentence and encoded(made[kind], apart) == encoded(made[kind], sentence)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=12))
def test_any_hangul_survives_a_small_tokenizer_that_has_never_seen_it(made, text):
    for kind in ("bytes", "fallback", "twin"):
        assert made[kind].decode(encoded(made[kind], text), skip_special_tokens=True).strip() == text


def test_the_longest_wording_fits_what_is_served_even_in_bytes(made):
    longest = max((x for n in NAMES for h in (0, 1) for x in instructions.wordings(n, held_out=bool(h))), key=len)
    assert len(encoded(made["bytes"], longest)) <= prompts.MAX_TOKENS
    assert np.mean([len(encoded(made["twin"], x)) for x in SENTENCES]) < np.mean(
        [len(encoded(made["bytes"], x)) for x in SENTENCES]
    )


def test_pairs_of_the_eight_canonical_sentences_differ_in_the_twins_tokens(made):
    ids = [encoded(made["twin"], sentence) for sentence in instructions.CANONICAL.values()]
    assert all(left != right for left, right in itertools.combinations(ids, 2))
