"""What is read off a trace of an accelerator's kernels."""

from __future__ import annotations

import pytest

from benchmarks import kernels


def test_time_is_counted_once_and_told_by_kind_and_by_kernel():
    # Two kernels side by side for 5 ns, nothing for 10 ns, then one alone.
    done = [
        kernels.Kernel(0, 10, "nvjet_tile"),
        kernels.Kernel(5, 20, "loop_add_fusion"),
        kernels.Kernel(30, 36, "cudnn_flash_dot"),
        kernels.Kernel(36, 40, "nvjet_tile"),
    ]
    found = kernels.summary(done, 2, {"loop_add_fusion": "layers/mlp"})
    assert found["seconds"] == pytest.approx(40e-9) and found["busy_seconds"] == pytest.approx(30e-9)
    assert found["kinds_seconds"] == pytest.approx({"attention": 6e-9, "products": 14e-9, "copies": 0, "other": 15e-9})
    first, second = found["longest"]
    assert (first["kernel"], first["executions"], first["source"]) == ("loop_add_fusion", 1, "layers/mlp")
    assert (second["kernel"], second["executions"]) == ("nvjet_tile", 2) and second["share"] == pytest.approx(14 / 35)


def test_kernels_are_known_by_the_instructions_that_they_are_called_like():
    text = '  %loop.add-fusion.3 = f32[2]{0} fusion(f32[2]{0} %x), metadata={op_name="jit(f)/layers/add"}\n'
    assert kernels.sources(text) == {"loop_add_fusion_3": "jit(f)/layers/add"}


def test_a_folder_without_a_trace_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trace \(\*\.xplane\.pb\); make one with --trace"):
        list(kernels.kernels(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: .* holds no trace"):
        kernels.main(kernels.Args(trace=tmp_path / "nowhere"))
