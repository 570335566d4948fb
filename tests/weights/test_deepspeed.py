"""DeepSpeed folders: whatever the number of ranks and the padding, the parameters that were cut up come back."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from robovlms_jax.weights import sources

torch = pytest.importorskip("torch")

SHAPES = ({"model.a": (3, 5), "model.b": (7,)}, {"model.c": (2, 2, 2), "model.d": ()})
"""Two parameter groups; sizes that divide over no number of ranks."""


def write(directory, stage: int, ranks: int, **changes) -> dict[str, torch.Tensor]:
    """A checkpoint as ZeRO writes it, float32 parts in the optimizer states and half precision beside them."""
    values = {name: torch.randn(shape) for group in SHAPES for name, shape in group.items()}
    flats: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in SHAPES:
        if stage == 3:
            rows = []
            for name in group:
                share = math.ceil(values[name].numel() / ranks)
                padded = torch.full((share * ranks,), math.nan)
                padded[: values[name].numel()] = values[name].reshape(-1)
                rows.append(padded.reshape(ranks, share))
            parts = torch.cat(rows, 1)
        else:
            flat = torch.cat([values[name].reshape(-1) for name in group])
            align = 2 * ranks
            parts = torch.nn.functional.pad(flat, (0, -len(flat) % align), value=math.nan).reshape(ranks, -1)
        for rank in range(ranks):
            flats[rank].append(parts[rank].clone())
    folder = directory / "checkpoint"
    folder.mkdir(parents=True)
    (directory / "latest").write_text("checkpoint")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(ranks):
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks], key: flats[rank]}
        torch.save(
            {"optimizer_state_dict": state | changes}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    module = {name: (torch.zeros(0) if stage == 3 else x.half()) for name, x in values.items()}
    module["model.buffer"] = torch.arange(3.0)
    if stage != 3:
        module["model.tied"] = module["model.a"]
    shapes = [collections.OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in SHAPES]
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(
        {"module": module, "param_shapes": shapes, "buffer_names": ["model.buffer"], "ds_version": "0.14"},
        folder / f"{prefix}mp_rank_00_model_states.pt",
    )
    return values | {"model.buffer": module["model.buffer"]} | ({} if stage == 3 else {"model.tied": values["model.a"]})


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_every_parameter_comes_back_in_float32(tmp_path, stage, ranks):
    # Padding is NaN, so one number taken from it, or from a neighbour, shows. 11 ranks: rank 10 sorts after rank 9.
    expected = write(tmp_path / "a.ckpt", stage, ranks)
    for path in (tmp_path / "a.ckpt", tmp_path / "a.ckpt" / "checkpoint"):
        source = sources.open_source(path)
        assert source.shapes == {name: tuple(x.shape) for name, x in expected.items()}
        for name, value in expected.items():
            found = source.read(name, (slice(None),) * value.ndim)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, value.numpy(), err_msg=name)
    np.testing.assert_array_equal(source.read("model.a", (slice(1, 2), slice(0, 2))), expected["model.a"][1:2, :2])


def test_incomplete_checkpoints_are_named(tmp_path):
    write(tmp_path / "a.ckpt", 2, 3)
    folder = tmp_path / "a.ckpt" / "checkpoint"
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer states of 2 ranks.*says they are 3"):
        sources.open_source(tmp_path / "a.ckpt")
    (folder / "mp_rank_00_model_states.pt").rename(tmp_path / "model.pt")
    for file in folder.glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no .*_optim_states\.pt"):
        sources.open_source(tmp_path / "a.ckpt")
    # What the message says to do instead works.
    assert "model.a" in sources.open_source(tmp_path / "model.pt").shapes
    (tmp_path / "a.ckpt" / "latest").write_text("global_step7")
    with pytest.raises(FileNotFoundError, match="names global_step7, which is no folder"):
        sources.open_source(tmp_path / "a.ckpt")


def test_parts_that_end_early_are_named(tmp_path):
    write(tmp_path / "a.ckpt", 2, 2, single_partition_of_fp32_groups=[torch.zeros(5), torch.zeros(5)])
    with pytest.raises(ValueError, match=r"model\.a has \[3, 5\] = 15 numbers, found 10"):
        sources.open_source(tmp_path / "a.ckpt")
