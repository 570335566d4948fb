import json

import numpy as np
import pytest

from robovlms_jax.inputs import prompts, tokenizers

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
