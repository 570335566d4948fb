"""Idefics3 8B: SigLIP So400m at 364 pixels, 2 x 2 patches gathered, a matrix, Llama 3. Laurençon et al. 2024,
arXiv:2408.12637."""

import functools

from robovlms_jax.backbones import registry, smolvlm

IDS = {"bos_id": 128_000, "eos_id": 128_001, "pad_id": 128_002}
PROMPT = {"prompt": "{instruction}", "special_tokens": True}
LLAMA3_8B = smolvlm.sizes(4096, 14_336, 32, 32, 8, 500_000.0) | {"vocab_size": 128_259}

read = functools.partial(smolvlm.read, model_type="idefics3", **PROMPT, **IDS)
write = functools.partial(smolvlm.write, architecture="Idefics3ForConditionalGeneration", image_token_id=128_257)
registry.register_family("idefics3", read, write)
registry.register("idefics3-8b-llama3")(
    functools.partial(read, smolvlm.published(2, smolvlm.SO400M | {"image_size": 364}, **LLAMA3_8B))
)
