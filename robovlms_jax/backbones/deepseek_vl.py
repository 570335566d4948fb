"""DeepSeek-VL 1.3B: SigLIP-L at 384 pixels, a two-layer MLP, Llama. Lu et al. 2024, arXiv:2403.05525."""

import functools

from robovlms_jax.backbones import connectors, registry, sections
from robovlms_jax.weights import rules

RULES = (
    rules.Rename(r"^vision_model\.vision_model\.", "vision_model."),
    *rules.siglip_vision("model.vision_model", "vision"),
    *rules.linear("model.aligner.linear1", "connector/hidden"),
    *rules.linear("model.aligner.linear2", "connector/out"),
    *rules.llama("model.language_model", "text"),
    *rules.head("lm_head", "text", tied=False),
    rules.LORA,
)
IDS = {"bos_id": 100_000, "eos_id": 100_001, "pad_id": 100_015}
FIELDS = {"connector": connectors.MLPConnectorConfig(), "prompt": "{instruction}", "tail": 0, "rules": RULES} | IDS
DEPTH = {"num_hidden_layers": 24, "num_attention_heads": 16}  # of both towers
SIGLIP_L = DEPTH | {"image_size": 384, "hidden_size": 1024, "intermediate_size": 4096}
LLAMA_1B = DEPTH | {"vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 5632}

read = functools.partial(sections.read_siglip_llama, model_type="deepseek_vl", **FIELDS)
write = functools.partial(sections.write_siglip_llama, architecture="DeepseekVLForConditionalGeneration")
registry.register_family("deepseek_vl", read, write)
registry.register("deepseek-vl-1.3b")(functools.partial(read, {"vision_config": SIGLIP_L, "text_config": LLAMA_1B}))
