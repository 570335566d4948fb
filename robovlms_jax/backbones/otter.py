"""Otter: Flamingo tuned on instructions, in one checkpoint with names of its own. Li et al. 2023, arXiv:2305.03726."""

import functools

from robovlms_jax.backbones import flamingo, registry

read = functools.partial(flamingo.read, model_type="otter")
LLAMA = {"text_config": {"model_type": "llama"}, "tie_word_embeddings": False, "cross_attn_every_n_layers": 4}

registry.register_family("otter", read, flamingo.write, flamingo.fit)
registry.register("otter-mpt-7b")(
    functools.partial(read, {"text_config": {"model_type": "mpt"}, "cross_attn_every_n_layers": 4})
)
registry.register("otter-llama-7b")(functools.partial(read, LLAMA))
