"""Programs read from their text: loops, collectives, matmuls and traffic, by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hymba_jax.aot.collectives import Collective, by_kind, collectives
from hymba_jax.aot.cost import analyze
from hymba_jax.aot.hlo import Program
from hymba_jax.aot.instructions import InstructionCost, by_part, instruction_costs
from hymba_jax.aot.kernel_time import CYCLES
from hymba_jax.aot.kernels import Kernel, kernels
from hymba_jax.aot.topology import CHIPS
from hymba_jax.aot.traffic import hbm_bytes, launches

TRIPS, INNER, ROWS, WIDTH = 5, 3, 16, 32
FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), devices=jax.devices("cpu")[:8])


def compiled(function, *shapes, mesh=None, specs=None):
    """The program of a function of float32 arrays, each with its part of the mesh."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh is not None:
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        arrays = [a.update(sharding=s) for a, s in zip(arrays, shardings, strict=True)]
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def matmul_flops(program):
    return sum(cost.flops for cost in instruction_costs(program, CHIPS["v5e"]))


def total_hbm_bytes(program):
    return sum(cost.hbm_bytes for cost in instruction_costs(program, CHIPS["v5e"]))


def repeated(body, trips):
    """The body, over and over."""
    return lambda x: lax.scan(lambda x, _: (body(x), None), x, length=trips)[0]


@pytest.mark.parametrize(
    ("collective", "kind", "group", "sent"),
    [
        (partial(lax.psum, axis_name="tensor"), "all-reduce", 4, 2 * 3 / 4),
        (partial(lax.psum, axis_name="data"), "all-reduce", 2, 2 * 1 / 2),
        (partial(lax.psum, axis_name=("data", "tensor")), "all-reduce", 8, 2 * 7 / 8),
        (
            partial(lax.ppermute, axis_name="data", perm=[(0, 1), (1, 0)]),
            "collective-permute",
            0,
            1,
        ),
        (
            partial(lax.all_to_all, axis_name="tensor", split_axis=0, concat_axis=0, tiled=True),
            "all-to-all",
            4,
            3 / 4,
        ),
    ],
)
def test_collectives_in_a_loop(mesh, collective, kind, group, sent):
    """Each device has the whole array, and iterations of the loop count."""
    whole = PartitionSpec()
    step = repeated(lambda x: jnp.tanh(collective(x)), TRIPS)
    function = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    found = [*collectives(compiled(function, (ROWS, WIDTH), mesh=mesh, specs=[whole]))]
    brought = ROWS * WIDTH * FLOAT
    assert {c.kind for c in found} == {kind}
    assert {c.trip_count for c in found} == {TRIPS}
    assert sum(c.size for c in found) == brought
    assert all(c.group == group for c in found if group)
    assert by_kind(found)[kind] == (TRIPS * len(found), TRIPS * brought * sent)


@pytest.mark.parametrize(
    ("collective", "kind", "sent"),
    [
        (partial(lax.all_gather, tiled=True), "all-gather", 3),
        (partial(lax.psum_scatter, tiled=True), "reduce-scatter", 3 / 4),
    ],
)
def test_collectives_that_change_the_size(mesh, collective, kind, sent):
    """An array of ROWS rows on each device is gathered from four, or summed to a quarter."""
    spec = PartitionSpec("tensor")
    function = jax.shard_map(
        lambda x: collective(x, "tensor"), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    program = compiled(function, (4 * ROWS, WIDTH), mesh=mesh, specs=[spec])
    size = ROWS * WIDTH * FLOAT
    assert [*collectives(program)] == [Collective(kind, 1, 4, size)]
    assert by_kind(collectives(program)) == {kind: (1, size * sent)}


def test_matmuls_in_nested_loops():
    def step(x):
        x = repeated(lambda x: jnp.tanh(x @ x), INNER)(x)
        return jnp.tanh(x @ x.T)

    program = compiled(repeated(step, TRIPS), (WIDTH, WIDTH))
    assert matmul_flops(program) == TRIPS * (INNER + 1) * 2 * WIDTH**3
    assert program.unknown_loops == 0


def test_a_loop_of_unknown_trip_count_is_counted_once():
    program = compiled(
        lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ x), x),
        (WIDTH, WIDTH),
    )
    assert program.unknown_loops == 1
    assert matmul_flops(program) == 2 * WIDTH**3


def test_launches_of_the_largest_loop():
    """Two matmuls on the larger array, and one on the smaller."""

    def function(small, large, kernel):
        small = lax.fori_loop(0, TRIPS, lambda _, x: x @ kernel, small)
        large = lax.fori_loop(0, TRIPS, lambda _, x: x @ kernel @ kernel, large)
        return small, large

    program = compiled(function, (ROWS, WIDTH), (4 * ROWS, WIDTH), (WIDTH, WIDTH))
    body = program.largest_loop()
    dots = [line for line in body for inner in program.fused(line) if inner.op == "dot"]
    assert {line.results[0].shape for line in dots} == {(4 * ROWS, WIDTH)}
    assert 2 <= launches(program, body) == sum(hbm_bytes(program, line) > 0 for line in body)
    assert launches(program, dots) == 2
    assert not Program("").largest_loop()


def test_traffic_in_a_loop():
    """Reads and writes the array, and carries it and the counter into the loop."""
    size = 1000
    program = compiled(repeated(lambda x: jnp.sin(x) * 2, TRIPS), (size,))
    in_loop = TRIPS * 2 * size * FLOAT
    assert in_loop <= total_hbm_bytes(program) <= in_loop + 4 * size * FLOAT


# As TPUs' compiler writes them: the condition alone knows the trip count, a matmul is a convolution
# of a batch of 5 along a spatial axis, and one gather is in each fusion that it runs beside.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%start (p: bf16[32,128]) -> bf16[128,128] {
  %p = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%async_collective_fusion.1 (q: bf16[32,128], a: bf16[5,16,128], b: bf16[5,64,128]) -> bf16[5,16,64] {
  %q = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %a = bf16[5,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %convolution = bf16[5,16,64]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0oi->0bf
}

%all-reduce-scatter.1 (r: f32[128,128]) -> f32[16,128] {
  %r = f32[128,128]{1,0:T(8,128)} parameter(0)
  %all-reduce = f32[128,128]{1,0:T(8,128)} all-reduce(%r), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[16,128]{1,0:T(8,128)} slice(%all-reduce), slice={[0:16], [0:128]}
}

%body (t: (s32[], bf16[32,128])) -> (s32[], bf16[32,128]) {
  %t = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %started = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%start
  %again = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%start
  %u = bf16[5,16,128]{2,1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call"
  %v = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call"
  %product = bf16[5,16,64]{2,1,0:T(8,128)(2,1)} fusion(%x, %u, %v), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done.1 = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%start
  %w = f32[128,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %scattered = f32[16,128]{1,0:T(8,128)} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%condition (t.1: (s32[], bf16[32,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %t.1 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[32,128]) -> bf16[32,128] {
  %x.1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %while = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_a_program_for_tpus():
    program = Program(TPU)
    gather = Collective("all-gather", 7, 4, 32 * 128 * 2)
    assert [*collectives(program)] == [
        *(gather, gather),  # two that share a channel, as those of equal layers do
        Collective("reduce-scatter", 7, 8, 128 * 128 * 4),
    ]
    assert matmul_flops(program) == 7 * 5 * 2 * 16 * 64 * 128
    assert kernels(program) == [
        Kernel("u", 7, (5, 16, 128), 0.0),
        Kernel("v", 7, (5, 64, 128), 0.0),
    ]


# A matmul, a gather and a kernel of a computation that is started, and done while others run.
STARTED = """HloModule jit_f, num_partitions=4

%started (p: bf16[16,128]) -> bf16[16,16] {
  %p = bf16[16,128]{1,0} parameter(0)
  %gathered = bf16[64,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %k = bf16[16,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %dot = bf16[16,16]{1,0} dot(%k, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: bf16[16,128]) -> bf16[16,16] {
  %a = bf16[16,128]{1,0} parameter(0)
  %start = ((bf16[16,128]{1,0}), bf16[16,16]{1,0}, u32[]) async-start(%a), calls=%started
  ROOT %done = bf16[16,16]{1,0} async-done(%start), calls=%started
}
"""  # noqa: E501


def test_what_is_started_counts_once():
    program = Program(STARTED)
    assert [*collectives(program)] == [Collective("all-gather", 1, 4, 16 * 128 * 2)]
    assert kernels(program) == [Kernel("k", 1, (16, 128), 0.0)]
    assert matmul_flops(program) == 2 * 16 * 16 * 128


def test_a_loop_that_was_unrolled_rises_in_larger_steps():
    unrolled = Program(TPU.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[] constant(2)"))
    assert [collective.trip_count for collective in collectives(unrolled)] == [
        4,
        4,
        4,
    ]  # 0, 2, 4, 6
    unknown = Program(TPU.replace("add(%i, %one)", "multiply(%i, %one)"))
    assert unknown.unknown_loops == 1


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", 2),
        ("{}", 8),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8], device_ids=([4,2]T(1,0)) {'a':(2)4}", 4),
    ],
)
def test_groups_in_all_the_ways_they_are_written(groups, group):
    text = TPU.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", groups)
    assert next(collectives(Program(text))).group == group


def test_a_matmul_of_the_gpus_library():
    text = """HloModule jit_f

ENTRY %main (a: bf16[16,128], b: bf16[128,64]) -> bf16[16,64] {
  %a = bf16[16,128]{1,0} parameter(0)
  %b = bf16[128,64]{1,0} parameter(1)
  ROOT %g = (bf16[16,64]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501
    program = Program(text)
    assert matmul_flops(program) == 2 * 16 * 64 * 128
    assert not kernels(program)


@pytest.mark.parametrize(
    ("traced", "name"),
    [
        ("while/body/shard_map/jvp()/selective_scan_forward/mpmd_map", "selective_scan_forward"),
        ("jit(f)/transpose(jvp(selective_scan_backward))/pallas_call", "selective_scan_backward"),
        ("jit(f)/jvp()/dot_product_attention_fwd", "dot_product_attention_fwd"),
    ],
)
def test_kernels_have_the_names_that_they_were_traced_by(traced, name):
    text = f"""HloModule jit_f

ENTRY %main (a: bf16[16,128]) -> bf16[2,128] {{
  %a = bf16[16,128]{{1,0}} parameter(0)
  ROOT %g = bf16[2,128]{{1,0}} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{traced}" stack_frame_id=4}}
}}
"""  # noqa: E501
    assert kernels(Program(text)) == [Kernel(name, 1, (16, 128), 0.0)]


# Slices of an operand that a fusion converts first, and an update in place of what it computes.
FUSED = """HloModule jit_f

%fused (p: bf16[8,128], q: f32[16,128], i: s32[]) -> f32[16,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %q = f32[16,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[8,128]{1,0} convert(%p)
  %first = f32[2,128]{1,0} slice(%wide), slice={[0:2], [0:128]}
  %again = f32[2,128]{1,0} slice(%wide), slice={[1:3], [0:128]}
  %sum = f32[2,128]{1,0} add(%first, %again)
  ROOT %updated = f32[16,128]{1,0} dynamic-update-slice(%q, %sum, %i, %zero)
}

ENTRY %main (a: bf16[8,128], b: f32[16,128], j: s32[]) -> f32[16,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[16,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = f32[16,128]{1,0} fusion(%a, %b, %j), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/transpose(jvp(ssm))/conv/add"}
}
"""  # noqa: E501


def test_slices_and_updates_in_a_fusion():
    """Twice 2 of 8 rows of bfloat16, the 4 bytes of the index, and 2 rows of float32."""
    (cost,) = instruction_costs(Program(FUSED), CHIPS["v5e"])
    assert cost.hbm_bytes == 2 * 2 * 128 * 2 + 4 + 2 * 128 * 4


@pytest.mark.parametrize(
    ("updated", "moved"),
    [
        # In place: a parameter, also behind a bitcast, or what another update made of it.
        ("%q", 2 * 2 * 128 * 2 + 4 + 2 * 128 * 4),
        ("%cast", 2 * 2 * 128 * 2 + 4 + 2 * 128 * 4),
        ("%before", 2 * 2 * 128 * 2 + 4 + 2 * 2 * 128 * 4),
        # A new array of 16 rows, and all of the parameter that it is computed from.
        ("%negative", 2 * 2 * 128 * 2 + 4 + 2 * 16 * 128 * 4),
    ],
)
def test_an_update_is_in_place_only_of_a_parameter(updated, moved):
    text = FUSED.replace(
        "  %zero = s32[] constant(0)",
        """  %zero = s32[] constant(0)
  %cast = f32[16,128]{1,0} bitcast(%q)
  %negative = f32[16,128]{1,0} negate(%q)""",
    ).replace("dynamic-update-slice(%q", f"dynamic-update-slice({updated}")
    text = text.replace(
        "  ROOT %updated",
        """  %before = f32[16,128]{1,0} dynamic-update-slice(%cast, %sum, %zero, %zero)
  ROOT %updated""",
    )
    unused = {"%negative", "%cast", "%before"} - {updated}
    if updated == "%before":
        unused -= {"%cast"}
    lines = [line for line in text.splitlines() if line.split(" = ")[0].strip() not in unused]
    (cost,) = instruction_costs(Program("\n".join(lines)), CHIPS["v5e"])
    assert cost.hbm_bytes == moved


def test_parts_are_the_scopes_that_an_instruction_was_traced_in():
    program = Program(FUSED)
    chip = CHIPS["v5e"]
    (cost,) = instruction_costs(program, chip)
    expected = (cost.hbm_bytes / chip.bandwidth, cost.hbm_bytes)
    assert by_part([cost, cost], chip) == {"ssm/conv": tuple(2 * total for total in expected)}


def test_an_instruction_takes_the_longest_of_its_costs():
    """One second of each on a v5e, then two of one of them."""
    chip = CHIPS["v5e"]
    for costs, seconds in [((197e12, 819e9, 1), 1), ((394e12, 0, 0), 2), ((0, 0, 3), 3)]:
        assert InstructionCost("mlp", *costs).seconds(chip) == seconds


# A copy of 2048 x 2048 numbers from HBM to VMEM, beside a matmul of arrays in VMEM; a second matmul
# begins when the copy has ended.
COPY = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[128,2048], v: bf16[2048,2048], w: bf16[2048,2048]) -> bf16[128,2048] {
  %x = bf16[128,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %v = bf16[2048,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %w = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[2048,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %first = bf16[128,2048]{1,0:T(8,128)(2,1)S(1)} dot(%x, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %copy-done = bf16[2048,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %second = bf16[128,2048]{1,0:T(8,128)(2,1)S(1)} dot(%first, %copy-done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (128, "partly"),  # 5.4 of the copy's 10.2 microseconds
        (2048, "nothing"),
        (0, "all"),  # what runs beside it reads HBM itself
    ],
)
def test_copies_hide_behind_what_computes(rows, shown):
    chip = CHIPS["v5e"]
    text = COPY.replace("128,2048]", f"{rows or 128},2048]")
    if not rows:
        text = text.replace("S(1)} parameter(1)", "} parameter(1)")
    program = Program(text)
    copy, *matmuls = instruction_costs(program, chip)
    alone, beside = copy.hbm_bytes / chip.bandwidth, matmuls[0].flops / chip.peak_flops
    assert copy.hbm_bytes == 2048 * 2048 * 2
    expected = {"all": alone, "nothing": 0.0, "partly": alone - beside}[shown]
    assert copy.seconds(chip) == pytest.approx(expected)
    assert [cost.hidden_seconds for cost in matmuls] == [0, 0]
    total = analyze(program, chip).step_seconds(chip)
    assert total == pytest.approx(expected + sum(cost.seconds(chip) for cost in matmuls))


def test_copies_at_the_same_time_share_what_hbm_is_idle():
    """Two copies beside one matmul: the time that they hide is the matmul's, not twice that."""
    chip = CHIPS["v5e"]
    start, end = (
        next(line for line in COPY.splitlines() if f" {op}(" in line) + "\n"
        for op in ("copy-start", "copy-done")
    )
    text = COPY.replace(start, start + start.replace("%copy-start", "%other-start"))
    other = end.replace("%copy-done", "%other-done").replace("%copy-start", "%other-start")
    text = text.replace(end, end + other)
    costs = [*instruction_costs(Program(text), chip)]
    hidden = [cost.hidden_seconds for cost in costs]
    beside = next(cost.flops for cost in costs if cost.flops) / chip.peak_flops
    assert sum(seconds > 0 for seconds in hidden) == 1
    assert sum(hidden) == pytest.approx(beside)


def test_what_a_fusion_returns_beside_others_is_read():
    """Two arrays in, a sum and a product out: four arrays of 512 bytes."""
    program = Program("""HloModule jit_f

%fused (p: f32[128], q: f32[128]) -> (f32[128], f32[128]) {
  %p = f32[128]{0} parameter(0)
  %q = f32[128]{0} parameter(1)
  %sum = f32[128]{0} add(%p, %q)
  %product = f32[128]{0} multiply(%p, %q)
  ROOT %both = (f32[128]{0}, f32[128]{0}) tuple(%sum, %product)
}

ENTRY %main (p: f32[128], q: f32[128]) -> (f32[128], f32[128]) {
  %x = f32[128]{0} parameter(0)
  %y = f32[128]{0} parameter(1)
  ROOT %f = (f32[128]{0}, f32[128]{0}) fusion(%x, %y), kind=kLoop, calls=%fused
}
""")
    assert total_hbm_bytes(program) == 4 * 128 * 4


def test_a_slice_of_a_sum_reads_its_share_of_the_terms():
    """As of a matmul that was split: a tenth of both of its sums, and the result, in 4 bytes."""
    program = Program("""HloModule jit_f

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%fused (p: f32[2,128,640]) -> f32[128,64] {
  %p = f32[2,128,640]{2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %total = f32[128,640]{1,0} reduce(%p, %zero), dimensions={0}, to_apply=%sum
  ROOT %part = f32[128,64]{1,0} slice(%total), slice={[0:128], [64:128]}
}

ENTRY %main (p: f32[2,128,640]) -> f32[128,64] {
  %x = f32[2,128,640]{2,1,0} parameter(0)
  ROOT %f = f32[128,64]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
""")
    assert total_hbm_bytes(program) == (2 + 1) * 128 * 64 * 4


# A scan of 256 positions, 640 channels and 16 states, with a softplus and a gate, that fetches some
# of its operands twice; and attention that computes 2**20 scores of heads of 64 and values of 128.
KERNELS = """HloModule jit_f

ENTRY %main (x: bf16[2,128,640], q: bf16[2,128,640]) -> bf16[2,128,640] {
  %x = bf16[2,128,640]{2,1,0} parameter(0)
  %q = bf16[2,128,640]{2,1,0} parameter(1)
  %y = bf16[2,128,640]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp(selective_scan_forward)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUw","cost_estimate":{"flops":"0","transcendentals":"2949120","bytes_accessed":"720896"}}}
  ROOT %o = bf16[2,128,640]{2,1,0} custom-call(%q), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/attention_forward/mpmd_map"}, backend_config={cost_estimate_json = "{\\22flops\\22: 402653184, \\22transcendentals\\22: 1048576, \\22bytes_accessed\\22: 655360}"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("chip", "scan", "attention"),
    [
        # Cycles per 1024 exponentials.
        (
            "v6e",
            2949120 / 1024 * CYCLES["TPU v6 lite"]["selective_scan_forward"] / 1.75e9,
            1024 * CYCLES["TPU v6 lite"]["attention_forward"] / 1.75e9,
        ),
        # 16 exponentials, or 128 bytes of shared memory, per cycle and multiprocessor.
        ("h100", 2949120 / (132 * 16 * 1.98e9), 2**20 * 10 / (132 * 128 * 1.98e9)),
    ],
)
def test_kernels_are_charged_what_they_state(chip, scan, attention):
    first, second = instruction_costs(Program(KERNELS), CHIPS[chip])
    assert (first.part, second.part) == ("selective_scan_forward", "attention_forward")
    assert first.kernel_seconds == pytest.approx(scan)
    assert second.kernel_seconds == pytest.approx(attention)
    assert (first.flops, second.flops) == (0, 2 * 2**20 * (64 + 128))
    # Two arrays of 327680 bytes, of which the scan states a tenth more.
    assert (first.hbm_bytes, second.hbm_bytes) == (720896, 655360)


def test_an_estimate_adds_up_what_instructions_take():
    """No FLOPs are charged twice: those of kernels are in their own times."""
    program, chip = Program(KERNELS), CHIPS["v6e"]
    cost = analyze(program, chip)
    assert cost.kernel_flops == cost.work.flops == 2 * 2**20 * (64 + 128)
    expected = sum(c.seconds(chip) for c in instruction_costs(program, chip))
    assert cost.step_seconds(chip) == expected
    assert all(c.seconds(chip) == c.kernel_seconds for c in cost.instructions)
