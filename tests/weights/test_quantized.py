"""Quantised weights are recognised by config.json, by names and by types."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from robovlms_jax.weights import quantized, sources


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"AWQ \(4 bits\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, r"GPTQ \(8 bits\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, r"bitsandbytes \(4 bits\)"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8"),
        ({"quantization_config": {"quant_method": "new-one"}}, "new-one"),
        ({"quantization_config": {"bits": 4}}, r"a method it does not name \(4 bits\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"MLX \(4 bits\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config.quantization_config: .*AWQ"),
    ],
)
def test_a_quantised_config_is_refused_with_its_method_and_what_to_take(values, method):
    with pytest.raises(ValueError, match=rf"{method}.*Take the repository it was quantised from"):
        quantized.require_float_config(values)


@pytest.mark.parametrize("values", [{}, {"quantization_config": None}, {"quantization_config": {}, "text_config": {}}])
def test_configs_that_quantise_nothing_pass(values):
    quantized.require_float_config(values)
    with pytest.raises(ValueError, match="MLX"):  # and the same with something that does, do not
        quantized.require_float_config(values | {"quantization": {"bits": 4}})


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["q_proj.qweight", "q_proj.qzeros", "q_proj.scales"], "GPTQ or AWQ"),
        (["q_proj.weight", "q_proj.SCB"], "bitsandbytes in 8 bits"),
        (["q_proj.weight.absmax", "q_proj.weight.quant_map"], "bitsandbytes in 4 bits"),
        (["q_proj.weight", "q_proj.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes in 4 bits"),
        (["q_proj.weight_packed", "q_proj.weight_shape"], "compressed-tensors"),
        (["q_proj.weight", "q_proj.weight_scale"], "compressed-tensors"),
        (["q_proj.weight", "q_proj.weight_scale_inv"], "FP8 in blocks"),
        (["q_proj.weight", "q_proj.scales", "q_proj.biases"], "MLX"),
    ],
)
def test_quantised_tensors_are_told_by_their_names(tmp_path, names, method):
    save_file({f"layers.0.{name}": np.ones((2, 2), np.float32) for name in names}, tmp_path / sources.SINGLE)
    with pytest.raises(ValueError, match=rf"{tmp_path}.* quantised by {method}.*see layers.0.q_proj"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2"])
def test_weights_in_few_bits_are_named_with_their_type(tmp_path, dtype, suffix):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    state = {"a.weight": torch.ones(2, 2).to(getattr(torch, dtype)), "position_ids": torch.arange(4)[None]}
    path = tmp_path / f"x.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(ValueError, match=r"holds a.weight in (?i:[uif]\w+): the weights are quantised"):
        sources.open_source(path)
    del state["a.weight"]
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    assert sources.open_source(path).shapes == {"position_ids": (1, 4)}, "integers that are no weights may be there"
