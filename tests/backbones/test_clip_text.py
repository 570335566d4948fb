"""CLIP's text tower against transformers', from a directory as it is published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robovlms_jax.backbones import clip_text
from robovlms_jax.inputs import tokenizers
from robovlms_jax.runs import build

SENTENCES = ["open the drawer", "push the red block to the left side of the table", "go"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(directory of a tiny random CLIP, transformers' embeddings float32[3, E] of SENTENCES)."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    directory = tmp_path_factory.mktemp("clip")
    tokenizers.make_twin_tokenizer(SENTENCES, 320, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = CLIPTextConfig(
        vocab_size=320, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=32, eos_token_id=tokenizer.eos_token_id, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.save_pretrained(directory)
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        pooled = model.text_model(input_ids=batch["input_ids"])
        expected = model.text_projection(pooled.pooler_output)
    return directory, torch.nn.functional.normalize(expected, dim=-1).numpy()


def test_sentences_are_embedded_as_transformers_does(clip, exact_matmul):
    directory, expected = clip
    found = build.embed_sentences(directory, SENTENCES)
    assert list(found) == SENTENCES
    np.testing.assert_allclose(np.stack(list(found.values())), expected, rtol=1e-4, atol=1e-5)


def test_another_models_directory_is_refused():
    with pytest.raises(ValueError, match=r"model_type 'llama'; expected a CLIP directory"):
        clip_text.read({"model_type": "llama"})


def test_the_published_large_model_is_read_from_its_sparse_file():
    # openai/clip-vit-large-patch14 states these and leaves the rest to transformers' defaults.
    values = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2},
    }
    assert clip_text.read(values) == clip_text.ClipTextConfig()
