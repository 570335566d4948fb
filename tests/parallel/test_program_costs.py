"""What is read off XLA's text of compiled programs, against figures worked out by hand.

programs/{v5e,h100}.txt: the gradient by w of x -> tanh(x @ w), five times over in a loop, x bf16[1024, 256] over data 2
x fsdp 4, w bf16[256, 256] over fsdp, as compiled for both by jaxlib 0.10.2 (libtpu 0.0.42.1); notes that are not read
are left out.
"""

from __future__ import annotations

import pathlib

import pytest

from robovlms_jax.parallel import hlo, program_costs

PROGRAMS = pathlib.Path(__file__).parent / "programs"
MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def costs(name: str) -> program_costs.Costs:
    return program_costs.of_text((PROGRAMS / f"{name}.txt").read_text(), 8)


@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_products_are_counted_as_often_as_their_loops_turn(name):
    # Per device 128 rows; forward, by x and by w: three products of 128 x 256 x 256, each five times. A loop that
    # counts once gives a fifth; the TPU's convolutions with holes taken for products give more.
    assert costs(name).flops == 3 * 5 * 2 * 128 * 256 * 256
    assert costs(name).unknown_loops == 0


@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_collectives_are_found_with_their_axes_and_bytes_as_often_as_they_run(name):
    # The kernel is gathered in both loops, a quarter from each device; its gradient goes over fsdp in every turn and
    # over data once. A TPU adds it up whole, a GPU scatters it.
    found = {(x.kind, x.axes(MESH), x.operand, x.times) for x in costs(name).collectives}
    quarter, whole = 256 * 256 * 2 // 4, 256 * 256 * 2
    scattered = "all-reduce" if name == "v5e" else "reduce-scatter"
    assert found == {
        ("all-gather", ("fsdp",), quarter, 5),
        (scattered, ("fsdp",), whole, 5),
        ("all-reduce", ("data",), quarter, 1),
    }
    assert sum(x.kind == "all-gather" for x in costs(name).collectives) == 2


def test_what_a_ring_sends_is_counted():
    def of(kind: str) -> float:
        return program_costs.Collective(kind, ((0, 1, 2, 3),), 100, 1, "", "f32").sent

    assert [of(kind) for kind in program_costs.KINDS] == [300, 150, 75, 75, 100]


def test_a_tpus_own_cycles_are_added_up_with_loops_and_without():
    found = costs("v5e")
    assert found.cycles > 2 * found.cycles_once > 0 and costs("h100").cycles == 0


CUDNN = """HloModule attention

ENTRY %main (q: bf16[2,24,4,8], lengths: s32[2]) -> bf16[2,4,24,8] {
  %q = bf16[2,24,4,8]{3,2,1,0} parameter(0)
  %lengths = s32[2]{0} parameter(1)
  %f = (bf16[2,4,24,8]{3,1,2,0}, f32[2,4,24]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q, %lengths), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"operation_queue_id": "0", "cudnn_fmha_backend_config": {"fmha_scale": 1.0, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "24", "24"], "tuple_shapes": []}}}
  %y = bf16[2,4,24,8]{3,1,2,0} get-tuple-element(%f), index=0
  %rows = f32[2,4,24]{2,1,0} get-tuple-element(%f), index=1
  %b = (bf16[2,4,24,8]{3,1,2,0}, bf16[2,4,24,8]{3,1,2,0}, bf16[2,4,24,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %rows, %y, %y, %lengths), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"operation_queue_id": "0", "cudnn_fmha_backend_config": {"fmha_scale": 1.0, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "24", "24"], "tuple_shapes": []}}}
  ROOT %dq = bf16[2,4,24,8]{3,1,2,0} get-tuple-element(%b), index=0
}
"""  # noqa: E501


def test_attention_by_cudnn_counts_its_products_and_what_it_is_given_and_gives():
    # Two products forward and five backward of 2 x 4 x 24 x 24 x 8, nothing of the size of the scores in memory.
    found = program_costs.of_text(CUDNN, 1)
    assert found.flops == 2 * 7 * 2 * 4 * 24 * 24 * 8
    array, rows, lengths = 2 * 24 * 4 * 8 * 2, 2 * 4 * 24 * 4, 2 * 4
    assert found.bytes == (4 + 8) * array + 2 * (rows + lengths)
    assert found.cudnn == program_costs.Kernels(2, found.flops, found.bytes) and found.kernels == 2
    assert costs("h100").cudnn == program_costs.Kernels()


def test_a_library_kernels_scratch_space_is_no_traffic():
    # The h100's products take 32 MiB of it each. Fails if it is counted: 15 x 32 MiB more.
    assert 5e6 < costs("h100").bytes < 20e6


FORMS = {
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "replica_groups=[2,4]<=[8], use_global_device_ids=true": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "replica_groups=mesh['a'=2,'b'=4] {'a','b'}": [tuple(range(8))],
    "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}": [
        (0, 1, 2, 3), (4, 5, 6, 7),
    ],
    "replica_groups=mesh['a'=8] {'a':(2)2}": [(0, 2), (1, 3), (4, 6), (5, 7)],
    "source_target_pairs={{0,1},{1,0}}, channel_id=3": [(0, 1), (1, 0)],
    "replica_groups={{0}}, channel_id=3": [tuple(range(8))],
    "replica_groups={}, channel_id=3": [tuple(range(8))],
}  # fmt: skip


@pytest.mark.parametrize("attributes", FORMS)
def test_groups_are_read_in_every_form(attributes):
    assert list(program_costs.groups(attributes, 8)) == FORMS[attributes]


def program(*lines: str, before: str = "") -> str:
    return "\n".join(["HloModule m", "", before, "ENTRY %main (p: f32[4]) -> f32[4] {", *lines, "}", ""])


def test_holes_and_borders_of_a_convolution_are_no_products():
    # Four numbers and a kernel of four, padded by three on both sides, as TPUs write products batched by heads: of the
    # 7 x 4 pairs, 1 + 2 + 3 + 4 + 3 + 2 + 1 = 16 are of a number and not of the border.
    lines = (
        "  %a = f32[2,4,8]{2,1,0} parameter(0)",
        "  %b = f32[8,4,16]{2,1,0} parameter(1)",
        "  ROOT %c = f32[2,7,16]{2,1,0} convolution(%a, %b), window={size=4 pad=3_3}, dim_labels=b0f_i0o->b0f",
    )
    assert program_costs.of_text(program(*lines), 1).flops == 2 * 2 * 16 * 8 * 16
    # With holes between the numbers every second pair is of a hole: 8 of 4 x 4.
    lines = (*lines[:2], lines[2].replace("pad=3_3", "pad=0_0 lhs_dilate=2").replace("[2,7,16]", "[2,4,16]"))
    assert program_costs.of_text(program(*lines), 1).flops == 2 * 2 * 8 * 8 * 16


LOOP = """%body (s: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %s = (s32[], f32[4,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%s), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%n, %y)
}

%less (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p, %q), direction=LT
}

%condition (s: (s32[], f32[4,4], s32[])) -> pred[] {
  %s.1 = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %n.1 = s32[] get-tuple-element(%s.1), index=0
  %end = s32[] get-tuple-element(%s.1), index=2
  ROOT %f = pred[] fusion(%n.1, %end), kind=kLoop, calls=%less
}
"""


def raised(by: int) -> str:
    add = f"  %by = s32[] constant({by})\n  %next = s32[] add(%n, %by)\n"
    return LOOP.replace(
        "  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%n,", f"{add}  ROOT %t = (s32[], f32[4,4]{{1,0}}) tuple(%next,"
    )


@pytest.mark.parametrize(
    ("end", "loop", "turns", "unknown"),
    [
        ("constant(9)", LOOP, 7, 0),
        ("constant(9)", raised(1), 7, 0),
        ("constant(9)", raised(2), 4, 0),  # libtpu does two turns in one where 16 devices pass weights around
        ("add(%first, %first)", LOOP, 1, 1),
    ],
)
def test_a_loop_whose_end_is_carried_along_is_counted_and_one_without_an_end_is_named(end, loop, turns, unknown):
    lines = (
        "  %first = s32[] constant(2)",
        f"  %last = s32[] {end}",
        "  %x = f32[4,4]{1,0} parameter(0)",
        "  %t = (s32[], f32[4,4]{1,0}, s32[]) tuple(%first, %x, %last)",
        "  ROOT %w = (s32[], f32[4,4]{1,0}, s32[]) while(%t), condition=%condition, body=%body",
    )
    found = program_costs.of_text(program(*lines, before=loop), 1)
    assert (found.flops, found.unknown_loops) == (turns * 2 * 4**3, unknown)


def test_of_what_a_fusion_slices_the_slice_alone_is_traffic():
    # One layer of 100 that lie together. Fails if the whole stack is counted as read.
    fused = """%one (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %m = f32[1,8]{1,0} multiply(%d, %d)
}
"""
    lines = (
        "  %p = f32[100,8]{1,0} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  ROOT %f = f32[1,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%one",
    )
    assert program_costs.of_text(program(*lines, before=fused), 1).bytes == 8 * 4 + 4 + 8 * 4


def test_of_what_a_fusion_inside_of_a_fusion_slices_or_updates_the_slice_alone_is_traffic():
    # As libtpu has it: the kernel of a product holds another one that cuts a layer out of the stack of all, and a third
    # that puts the result into another stack. Fails if either stack of 3200 bytes is counted.
    fused = """%cut (p: f32[100,8], i: s32[]) -> f32[8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %b = f32[8]{0} bitcast(%d)
}
%put (p: f32[100,8], x: f32[8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %u = f32[1,8]{1,0} bitcast(%x)
  ROOT %d = f32[100,8]{1,0} dynamic-update-slice(%p, %u, %i, %z)
}
%kernel (p: f32[100,8], q: f32[100,8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[100,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = f32[8]{0} fusion(%p, %i), kind=kLoop, calls=%cut
  %m = f32[8]{0} multiply(%c, %c)
  ROOT %w = f32[100,8]{1,0} fusion(%q, %m, %i), kind=kLoop, calls=%put
}
"""
    lines = (
        "  %p = f32[100,8]{1,0} parameter(0)",
        "  %q = f32[100,8]{1,0} parameter(1)",
        "  %i = s32[] parameter(2)",
        "  ROOT %f = f32[100,8]{1,0} fusion(%p, %q, %i), kind=kOutput, calls=%kernel",
    )
    assert program_costs.of_text(program(*lines, before=fused), 1).bytes == 8 * 4 + 4 + 8 * 4


def test_memory_on_the_chip_is_no_traffic():
    lines = (
        "  %p = f32[8]{0:T(256)S(1)} parameter(0)",
        "  ROOT %f = f32[8]{0:T(256)} negate(%p)",
    )
    assert program_costs.of_text(program(*lines), 1).bytes == 8 * 4


@pytest.mark.parametrize(("where", "times"), [("", 2), ("S(1)", 1)])
def test_a_part_that_is_fetched_ahead_is_read_alone(where, times):
    # As a TPU's program fetches a matrix bit by bit. Fails if every part counts as the whole matrix.
    lines = (
        "  %matrix = f32[64]{0} parameter(0)",
        f"  %begun = ((f32[64]{{0}}), f32[8]{{0:T(8){where}}}, s32[]{{:S(2)}}) slice-start(%matrix), slice={{[8:16]}}",
        f"  ROOT %part = f32[8]{{0:T(8){where}}} slice-done(%begun)",
    )
    assert program_costs.of_text(program(*lines), 1).bytes == times * 8 * 4


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="expected XLA's HLO with a computation called ENTRY"):
        hlo.parse("module @jit_f {}")
