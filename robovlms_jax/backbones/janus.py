"""Janus-Pro, as it reads pictures: SigLIP-L, a two-layer MLP, Llama. Chen et al. 2025, arXiv:2501.17811."""

from robovlms_jax.backbones import base, deepseek_vl, registry, sections
from robovlms_jax.weights import rules

UNUSED = rules.Ignore(r"(vqmodel|generation_\w+)\..*", "draws pictures; no part of the language model")
NAMES = {"out_proj": "projection_layer", "aligner.linear1": "aligner.fc1", "aligner.linear2": "aligner.hidden_layers.0"}
RULES = (UNUSED, *rules.renamed(deepseek_vl.RULES, NAMES))
OWN = {"rules": RULES, "pad_id": 100_002}
VISION = sections.vision(use_qk_norm=False, attention_bias=True, depth=2)
ENDS = {"image_start": 100_016, "image_end": 100_593}  # entries of our own; the tokenizer's <begin_of_image>, ...


def read(values: dict) -> base.VLMConfig:  # the width inside the tower's MLPs is a ratio in this config.json
    tower = deepseek_vl.SIGLIP_L | {"hidden_act": "gelu", "mlp_ratio": 4.0} | (values.get("vision_config") or {})
    tower["intermediate_size"] = round(tower["hidden_size"] * tower["mlp_ratio"])
    values = {**values, "vision_config": tower}
    fields = {end: (values.get(f"{end}_token_id", token),) for end, token in ENDS.items()} | OWN
    return deepseek_vl.read(values, VISION.read(values, sections.SIGLIP_B), model_type="janus", **fields)


def write(config: base.VLMConfig) -> dict:
    sizes = {"projection_dim": config.text.width, "mlp_ratio": config.vision.mlp_dim / config.vision.width}
    fields = {f"{end}_token_id": getattr(config, end)[0] for end in ENDS}
    fields["vision_config"] = VISION.write(config.vision) | sizes
    return sections.write_siglip_llama(config, "JanusForConditionalGeneration", **fields)


registry.register_family("janus", read, write)
registry.register("janus-pro-1b")(lambda: read({"text_config": deepseek_vl.LLAMA_1B}))
