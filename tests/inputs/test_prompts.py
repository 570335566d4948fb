import json
import types

import numpy as np
import pytest

from robovlms_jax.inputs import literal, prompts, tokenizers

TEMPLATE = "<grounding>An image of a robot {instruction}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizers.make_twin_tokenizer([prompts.format_prompt(TEMPLATE, "open the drawer")], 300, directory)
    return tokenizers.load_tokenizer(directory)


def test_prompt_strips_the_instruction_and_keeps_its_braces():
    assert prompts.format_prompt(TEMPLATE, " open {it}\n") == "<grounding>An image of a robot open {it}"
    assert prompts.format_prompt("{instruction}\n", "go ") == "go\n"
    with pytest.raises(ValueError, match=r"no \{instruction\}"):
        prompts.format_prompt("An image of a robot", "open")


def test_encode_pads_right_and_masks_padding(tokenizer):
    ids = tokenizer("<grounding>An image of a robot open the drawer")["input_ids"]
    text_ids, text_mask = prompts.encode(tokenizer, TEMPLATE, "open the drawer ", len(ids) + 3)
    assert text_ids.dtype == np.int32
    assert text_mask.dtype == bool
    np.testing.assert_array_equal(text_ids, ids + [tokenizer.pad_token_id] * 3)
    np.testing.assert_array_equal(text_mask, [True] * len(ids) + [False] * 3)
    np.testing.assert_array_equal(prompts.encode(tokenizer, TEMPLATE, "open the drawer", len(ids))[0], ids)


def test_encode_equals_upstreams_text_batch(golden, shared_data):
    tokenizer = tokenizers.load_tokenizer(shared_data / "golden/kosmos")
    meta = json.loads((shared_data / "golden/calvin/meta.json").read_text())
    batch = golden("calvin/w8c10.npz")
    for instruction, text, mask in zip(meta["variants"]["w8c10"]["raw_text"], batch["text"], batch["text_mask"]):
        text_ids, text_mask = prompts.encode(tokenizer, TEMPLATE, instruction, len(text))
        np.testing.assert_array_equal(text_mask, mask)
        np.testing.assert_array_equal(text_ids[text_mask], text[mask == 1])


def test_too_long_a_prompt_is_refused_with_its_count(tokenizer):
    count = len(tokenizer("<grounding>An image of a robot open the drawer")["input_ids"])
    with pytest.raises(ValueError, match=f"open the drawer' has {count} tokens but data.text_length is {count - 1}"):
        prompts.encode(tokenizer, TEMPLATE, "open the drawer", count - 1)


@pytest.mark.parametrize("multiple", [1, 8])
def test_longest_fits_every_prompt_and_no_more(tokenizer, multiple):
    instructions = ["go", "open the drawer quickly", "go"]
    length = prompts.longest(tokenizer, TEMPLATE, instructions, multiple)
    assert length % multiple == 0
    real = max(prompts.encode(tokenizer, TEMPLATE, instruction, length)[1].sum() for instruction in instructions)
    assert length - multiple < real <= length


def test_longest_of_nothing_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no annotated segment"):
        prompts.longest(tokenizer, TEMPLATE, [])


def test_special_tokens_may_be_left_to_the_template(tokenizer):
    ids, mask = prompts.encode(tokenizer, "</s>{instruction}\n", "open", 12, special_tokens=False)
    assert ids[0] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in ids[mask]
    assert mask.sum() == prompts.longest(tokenizer, "</s>{instruction}\n", ["open"], 1, special_tokens=False)
    assert mask.sum() + 2 == prompts.longest(tokenizer, "</s>{instruction}\n", ["open"], 1)


@pytest.mark.parametrize(
    ("tokens", "length", "slots"), [(5, 24, 24), (24, 24, 24), (25, 24, 48), (200, 24, 256), (3, 0, 8), (300, 304, 304)]
)
def test_served_prompts_share_few_lengths(tokens, length, slots):
    assert prompts.served_length(tokens, length, "open the drawer") == slots


def test_a_prompt_far_longer_than_training_had_is_refused():
    with pytest.raises(ValueError, match=r"'open the drawer open .*has 257 tokens; at most 256 are served"):
        prompts.served_length(257, 24, "open the drawer " * 80)


ODD = "put </s> in the <image>, <s> or </S>"


@pytest.mark.parametrize("special_tokens", [True, False])
def test_special_tokens_that_an_instruction_writes_out_are_text(tokenizer, special_tokens, caplog):
    # Fails where </s> in an instruction ends the sentence, or <image> stands for a picture.
    literal._SAID.clear()
    ids = prompts.ids_of(tokenizer, TEMPLATE, ODD, special_tokens)
    names = ("<grounding>", "<s>", "</s>", "<image>")
    grounding, start, end, image = (ids.count(tokenizer.convert_tokens_to_ids(name)) for name in names)
    assert (grounding, start, end, image) == (1, special_tokens, special_tokens, 0)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(said.split()) == "".join(f"An image of a robot {ODD}".split())
    padded, mask = prompts.encode(tokenizer, TEMPLATE, ODD, len(ids), special_tokens=special_tokens)
    assert padded.tolist() == ids and mask.all()
    assert prompts.longest(tokenizer, TEMPLATE, ["go", ODD], 1, special_tokens=special_tokens) == len(ids)
    assert "</s>" in caplog.text and "read as text" in caplog.text


class Stubborn:
    """A tokenizer that cuts out its own words whatever it is asked, as those do that are added and not special."""

    def __init__(self):
        self.is_fast = True
        self.added_tokens_decoder = {7: types.SimpleNamespace(content="<|user|>", special=False, normalized=False)}

    def __call__(self, text, **options):
        ids = [7] if text == "<|user|>" else [100 + ord(letter) for letter in text]
        return {"input_ids": ids, "offset_mapping": [(0, len(text))] * len(ids)}


def test_a_word_of_the_template_that_is_no_special_token_is_text_in_an_instruction_too():
    expected = [100 + ord(letter) for letter in "<|user|>"]
    assert literal.encode(Stubborn(), "<|user|>") == (expected, [(0, 8)] * 8)
    assert literal.pattern(Stubborn(), "<|user|>{instruction}").search("a <|user|>")
    assert not literal.pattern(Stubborn(), "{instruction}").search("a <|user|>")
