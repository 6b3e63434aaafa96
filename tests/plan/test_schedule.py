"""Compiled programs as text: what is in them, and what they take when they are run through."""

import pytest

from jaxinfer.attention.pairs import Cut
from jaxinfer.plan.bundles import Code, read_bundles, read_code
from jaxinfer.plan.hlo import parse
from jaxinfer.plan.profile import profiled
from jaxinfer.plan.roofline import Bound
from jaxinfer.plan.schedule import BRANCHES, COLLECTIVES, CONDITIONS, KERNELS, LOOPS, Least, Schedule
from jaxinfer.plan.slices import Chip

CHIP = Chip("none", 2**30, bandwidth=1e9, flops=1e12, link=1e8, clock=1e9)  # a cycle is a ns, and so is a byte
HEAD = """HloModule jit_f, is_scheduled=true

FileNames
1 "/lib/jax/core.py"
2 "/src/jaxinfer/layers/norm.py"
3 "/src/jaxinfer/weights/products.py"
4 "/src/jaxinfer/sampling/filters.py"

FileLocations
1 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=1}

"""
VMEM = "{1,0:T(8,128)S(1)}"
PARAMS = """
  %x = bf16[8,10]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="x"}
  %w = bf16[100,10]{1,0:T(8,128)} parameter(1), metadata={op_name="params[\\'model.layers.0.mlp.up.weight\\']"}
  %v = bf16[10,100]{1,0} parameter(2), metadata={op_name="params[\\'model.layers.1.mlp.down.weight\\'].values"}
  %kv = bf16[1000,10]{1,0} parameter(3), metadata={op_name="state.cache[0][0].kv"}
"""


def cost(cycles: int, bounds: tuple[int, ...] = (1,), frame: int = 2) -> str:
    sizes = ",".join(f'"{n}"' for n in bounds)
    config = f'{{"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":[{sizes}]}}}}'
    return f'metadata={{op_name="jit(f)/dot" stack_frame_id={frame}}}, backend_config={config}'


def entry(body: str, *others: str) -> str:
    return HEAD + "\n".join(others) + "\nENTRY %main (x: bf16[8,10]) -> bf16[8,100] {" + PARAMS + body + "\n}\n"


def schedule(text: str, codes: dict[str, Code] | None = None, **options) -> Schedule:
    made = Schedule(parse(text), CHIP, codes or {}, **options)
    made.run(made.entry)
    return made


def test_a_program_is_parsed():
    tuples = "(f32[8]{0:T(128)S(1)}, /*index=1*/(bf16[8,100]{1,0}, s4[3]), token[])"
    text = entry(
        f"  ROOT %fusion.1 = {tuples} fusion(%x, %w), kind=kOutput, calls=%inner, {cost(70, (2, 3))}",
        "%inner (p: bf16[8,10]) -> f32[8] {\n  ROOT %p.1 = f32[8] parameter(0)\n}",
    )
    module = parse(text)
    own = module.computations[module.entry]["fusion.1"]
    assert (module.entry, own.opcode, own.operands, own.called("calls")) == ("main", "fusion", ("x", "w"), ("inner",))
    assert [(a.bytes, a.dims, a.in_memory) for a in own.arrays] == [
        (32, (8,), False),
        (1600, (8, 100), True),
        (2, (3,), True),
        (0, (), True),
    ]
    assert (own.cycles, own.iterations, own.trips, own.frame, own.op_name) == (70, 6, None, 2, "jit(f)/dot")
    assert module.computations["main"]["w"].op_name == "params['model.layers.0.mlp.up.weight']"
    assert module.computations["inner"].root == "p.1"
    assert module.files[2] == ("/lib/jax/core.py", "/src/jaxinfer/layers/norm.py")
    with pytest.raises(ValueError, match="not closed"):
        parse(entry("  %y = bf16[8] add(%x"))


def test_operations_are_named_by_weights_and_source():
    made = schedule(
        entry(f"""
  %a = bf16[8,100]{VMEM} fusion(%x, %w), {cost(3000)}
  %b = bf16[8,10]{VMEM} convolution(%a, %v), {cost(4000)}
  %c = bf16[8]{{0:S(1)}} fusion(%b), {cost(50)}
  %d = bf16[8]{{0:S(1)}} fusion(%b), {cost(60, frame=4)}
  %e = bf16[8]{{0:S(1)}} fusion(%b), {cost(7, frame=3)}
  ROOT %f = bf16[8,10]{VMEM} copy(%b), {cost(8, frame=0)}""")
    )
    assert {name: op.cycles for name, op in made.ops.items()} == {
        "mlp.up": 3000,
        "mlp.down": 4000,
        "norm": 50 + 7,
        "sampling": 60,
        "copies": 8,
    }
    assert made.ops["mlp.up"].read == 100 * 10 * 2
    assert made.seconds == pytest.approx(7125e-9)
    assert made.ops["mlp.up"].binds(CHIP) == "unknown"  # no bundles


def test_the_memory_binds():
    made = schedule(entry(f"  ROOT %a = bf16[8,100]{{1,0}} fusion(%x, %w), {cost(10)}"))
    op = made.ops["mlp.up"]
    assert (op.read, op.written, op.binds(CHIP)) == (2000, 1600, "memory")
    assert made.seconds == pytest.approx(3600e-9)


def test_what_is_sliced_and_changed_in_place_is_not_read():
    gathers = """%gathers (t: bf16[1000,10]) -> bf16[8,10] {
  %t = bf16[1000,10]{1,0} parameter(0)
  %i = s32[8]{0} parameter(1)
  ROOT %g = bf16[8,10]{1,0} gather(%t, %i), offset_dims={1}
}"""
    writes = """%writes (t: bf16[1000,10]) -> bf16[1000,10] {
  %t.1 = bf16[1000,10]{1,0} parameter(0)
  %u = bf16[2,10]{1,0} parameter(1)
  %z = s32[] constant(0)
  ROOT %s = bf16[1000,10]{1,0} dynamic-update-slice(%t.1, %u, %z, %z)
}"""
    text = entry(
        f"""
  %i.1 = s32[8]{{0:S(1)}} constant({{0}})
  %u.1 = bf16[2,10]{VMEM} constant({{0}})
  %a = bf16[8,10]{VMEM} fusion(%kv, %i.1), calls=%gathers, {cost(1)}
  ROOT %b = bf16[1000,10]{{1,0}} fusion(%kv, %u.1), calls=%writes, {cost(1)}""",
        gathers,
        writes,
    )
    op = schedule(text).ops["norm"]
    assert (op.read, op.written) == (160, 40)


def test_copies_run_beside_and_are_waited_for():
    """3,000 bytes begin, 1,000 ns pass, of which an operation takes half the memory's; the rest is waited for."""
    start = "((bf16[100,10]{1,0}), bf16[50,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:50], [0:10]}"
    text = entry(f"""
  %s = {start}
  %t = (bf16[10,100]{{1,0:S(1)}}, bf16[10,100]{{1,0}}, u32[]{{:S(2)}}) copy-start(%v)
  %a = bf16[25,10]{{1,0}} fusion(%x), {cost(1000)}
  %d = bf16[50,10]{VMEM} slice-done(%s)
  %e = bf16[10,100]{VMEM} copy-done(%t)
  %c = bf16[50,10]{VMEM} custom-call(%d), custom_call_target="ConcatBitcast"
  ROOT %b = bf16[8,100]{VMEM} fusion(%x, %c), {cost(100)}""")
    made = schedule(text)
    up, down = made.ops["mlp.up"], made.ops["mlp.down"]
    assert (up.prefetched, up.read, up.cycles, up.count) == (1000, 1000, 100, 1)
    assert (down.prefetched, down.count) == (2000, 0)
    assert up.waited == pytest.approx(500e-9)
    assert down.waited == pytest.approx(2000e-9)
    assert made.seconds == pytest.approx(3600e-9)


LOOP = """%{name} (t: (s32[], bf16[10,100])) -> (s32[], bf16[10,100]) {{
  %t = (s32[]{{:S(2)}}, bf16[10,100]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w.1 = bf16[10,100]{{1,0:S(1)}} get-tuple-element(%t), index=1
  %dot = bf16[10,100]{{1,0:S(1)}} fusion(%w.1), {cost}
  ROOT %r = (s32[], bf16[10,100]) tuple(%i, %w.1)
}}"""


@pytest.mark.parametrize(("known", "times"), [(True, 5), (False, 1)])
def test_loops(known, times):
    trips = '"known_trip_count":{"n":"5"}' if known else ""
    body = f"""
  %zero = s32[] constant(0)
  %start = (s32[], bf16[10,100]) tuple(%zero, %v)
  ROOT %loop = (s32[], bf16[10,100]) while(%start), condition=%cond, body=%body, backend_config={{{trips}}}"""
    loop = LOOP.format(name="body", cost=cost(100))
    made = schedule(entry(body, loop, "%cond (t: s32[]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}"))
    assert (made.ops["mlp.down"].count, made.ops["mlp.down"].cycles) == (times, 100 * times)
    assert made.seconds == pytest.approx(100e-9 * times)
    assert (LOOPS in made.notes) is not known


def test_the_branch_that_takes_least():
    body = """
  %zero = s32[] constant(0)
  %start = (s32[], bf16[10,100]) tuple(%zero, %v)
  ROOT %c = (s32[], bf16[10,100]) conditional(%zero, %start, %start), branch_computations={%long, %short}"""
    text = entry(body, LOOP.format(name="long", cost=cost(9000)), LOOP.format(name="short", cost=cost(2000)))
    made = schedule(text)
    assert made.seconds == pytest.approx(2000e-9)
    assert BRANCHES in made.notes


def test_collectives():
    text = entry(f"""
  %a = (f32[100]{{0:S(1)}}, f32[800]{{0:S(1)}}) all-gather-start(%x)
  %b = bf16[8]{{0:S(1)}} fusion(%x), {cost(2000)}
  %c = f32[800]{{0:S(1)}} all-gather-done(%a)
  ROOT %d = f32[100]{{0:S(1)}} all-reduce(%b), to_apply=%add""")
    made = schedule(text)
    gather, reduce = made.ops["all-gather"], made.ops["all-reduce"]
    assert (gather.sent, reduce.sent, gather.unknown) == (3200, 800, 1)
    assert gather.waited == pytest.approx(30000e-9)
    assert made.seconds == pytest.approx(32000e-9 + 8000e-9)
    assert gather.binds(CHIP) == "links"
    assert COLLECTIVES in made.notes


def test_a_permutation_has_one_link():
    """Two to different neighbours run beside each other, and two to the same one after the other."""
    around, back = "{{0,1},{1,0}}", "{{1,0},{0,1}}"
    sent = "(bf16[100]{0:S(1)}, bf16[100]{0:S(1)}) collective-permute-start(%x), source_target_pairs="
    done = "bf16[100]{0:S(1)} collective-permute-done"
    one, two = (
        entry(f"""
  %a = {sent}{around}
  %b = {sent}{other}
  %c = bf16[8]{{0:S(1)}} fusion(%x), {cost(2000)}
  %d = {done}(%a)
  ROOT %e = {done}(%b)""")
        for other in (back, around)
    )
    made, turns = schedule(one), schedule(two)
    assert made.ops["collective-permute"].sent == 400
    assert made.ops["collective-permute"].waited == pytest.approx(6000e-9)
    assert turns.seconds == pytest.approx(16000e-9)


SCATTER = """%all-reduce-scatter (input: f32[800]) -> f32[100] {
  %input = f32[800]{0:S(1)} parameter(0)
  %sum = f32[800]{0:S(1)} all-reduce(%input), to_apply=%add
  ROOT %part = f32[100]{0:S(1)} dynamic-slice(%sum, %i), dynamic_slice_sizes={100}
}"""


@pytest.mark.parametrize("call", ["fusion(%a), kind=kCustom, calls=%all-reduce-scatter", "reduce-scatter(%a)"])
def test_all_of_what_is_scattered_is_sent(call):
    text = entry(
        f"""
  %a = f32[800]{{0:S(1)}} fusion(%x), {cost(1000)}
  ROOT %b = f32[100]{{0:S(1)}} {call}""",
        SCATTER,
    )
    made = schedule(text)
    assert made.ops["reduce-scatter"].sent == 3200
    assert made.seconds == pytest.approx(33000e-9)


def test_loops_whose_trips_follow_from_their_counters():
    """Those that the compiler makes of a product and its collective say nothing of how often they run."""

    def text(start: str, test: str = "direction=LT") -> str:
        loop = f"""%body (t: (s32[], bf16[10])) -> (s32[], bf16[10]) {{
  %two = s32[] constant(2)
  %t = (s32[], bf16[10]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %next = s32[] add(%i, %two)
  %v2 = bf16[10]{{0:S(1)}} get-tuple-element(%t), index=1
  %made = bf16[10]{{0:S(1)}} fusion(%v2), {cost(1000)}
  ROOT %r = (s32[], bf16[10]) tuple(%next, %made)
}}
%condition (t2: (s32[], bf16[10])) -> pred[] {{
  %end = s32[] constant(7), metadata={{}}
  %t2 = (s32[], bf16[10]) parameter(0)
  %j = s32[] get-tuple-element(%t2), index=0
  ROOT %less = pred[] compare(%j, %end), {test}
}}"""
        body = f"""
  %one = s32[] constant(1)
  %begin = s32[]{{:S(2)}} {start}
  %all = (s32[], bf16[10]) tuple(%begin, %x)
  ROOT %w2 = (s32[], bf16[10]) while(%all), condition=%condition, body=%body"""
        return entry(body, loop)

    known = schedule(text("copy(%one)"))
    assert known.seconds == pytest.approx(3000e-9)
    assert LOOPS not in known.notes
    for unknown in (schedule(text("parameter(4)")), schedule(text("copy(%one)", "direction=GT"))):
        assert unknown.seconds == pytest.approx(1000e-9)
        assert LOOPS in unknown.notes


ALIASES = '"aliasing_operands":{"lists":[{"indices":["0","2"]}]}'
KERNEL_CALL = f"""
  %new = bf16[1000,10]{{1,0}} fusion(%kv, %x), calls=%f, backend_config={{{ALIASES}}}
  ROOT %attention.7 = bf16[8,10]{VMEM} custom-call(%x, %new), custom_call_target="tpu_custom_call\""""
IN_PLACE = """%f (t: bf16[1000,10]) -> bf16[1000,10] {
  %t = bf16[1000,10]{1,0} parameter(0)
  %u = bf16[8,10]{1,0} parameter(1)
  ROOT %s = bf16[1000,10]{1,0} scatter(%t, %u, %u), to_apply=%add
}"""
BUNDLES = """
= control target key start
LB: loop body

     0   :  { %s1 = smov 0  ;;  %s2 = smov 0 }
   0x1 LB: > { %s3 = sadd.s32 1, %s1 }
   0x2   : > { %s4 = sadd.s32 1, %s3 }
   0x3 LB: >> { %v5 = vadd.f32 %v1, %v2 }
   0x4 PF: >> { %v6 = vadd.f32 %v5, %v2 }
   0x5   :  { %s7 = sfence }
"""
# A loop in which nothing starts in one bundle, and around it one that has a second loop; each with its branch, and what
# runs behind that.
NESTED = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s3 = sadd.s32 1, %s1 } /* Start region 1 */
   0x2 LB: >> { %v5 = vadd.f32 %v1, %v2 }
   0x3   :  {} /* a comment */
   0x4   : > { %9 = sbr.rel (!%p1) target = $region2 }
   0x5   : >> { %v6 = vadd.f32 %v5, %v2 }
   0x6   :  {}
   0x7   :  {}
   0x8   :  {} /* End region 2 */
   0x9 PF: > { %12 = sbr.rel (%p2) target = $region4 }
   0xa LB: >> { %v7 = vadd.f32 %v1, %v2 }
   0xb   : > { %9 = sbr.rel (!%p1) target = $region5 }
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   : > { %s7 = sadd.s32 1, %s1 }
  0x11   :  { %9 = sbr.rel (!%p1) target = $region1 }
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  { %s7 = sfence }
"""
SLOTS = """== CAPACTIY:
MXU, XLU, VALU, VLOAD:FILL, SALU
    4     3     4     3     2
== UTILIZATION:
0 0 0 0 2
0 0 0 0 2
0 0 0 0 2
0 0 3 0 1
0 3 3 0 0
0 0 0 0 1
"""


def test_bundles(tmp_path):
    code = read_code(BUNDLES, SLOTS, grid=7)
    assert (code.depths, code.bundles, code.run(7)) == ((2, 2, 2), 6, 2 + 7 * 4)
    assert code.loops == ((1, 2), (2, 2))
    assert code.slots == {"MXU": 0, "XLU": 0.5, "VALU": 0.75, "SALU": 0.25}  # in the innermost loop
    assert read_code(BUNDLES, SLOTS + "0 0 0 0 1\n").slots == {}  # not of this code
    names = "1-fusion.3", "2-attention.7", "3-TLP"
    for i, name in enumerate(names):
        (tmp_path / f"{name}-0{i}-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "1-fusion.3-01-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)
    same = "key:fusion.3\nordinal:4\nequivalent_hlos[size=2]:\n  fusion.3\n  fusion.9\nkey:other\nordinal:5\n"
    (tmp_path / "9-TLP-00-deduplication-map.txt").write_text(same)
    (tmp_path / "mosaic").mkdir()
    kernel = "func.func @attention(%a: i32) attributes {iteration_bounds = array<i64: 3, 2>} {"
    (tmp_path / "mosaic" / "5-0001-mosaic-dump-anonymous-original.txt").write_text(kernel)
    codes = read_bundles(tmp_path)
    assert sorted(codes) == ["TLP", "attention.7", "fusion.3", "fusion.9"]
    assert codes["fusion.9"] is codes["fusion.3"]
    assert (codes["fusion.3"].grid, codes["fusion.3"].slots["VALU"], codes["attention.7"].grid) == (None, 0.75, 6)


def test_nested_loops():
    """How many bundles run is said by how often each loop does, if they are those that the code has."""
    code = read_code(NESTED)
    assert (code.depths, code.loops) == ((2, 8, 13), ((1, 8), (2, 7), (2, 6)))
    runs = code.runs([(1, 3), (2, 10), (2, 0)])
    assert runs == ((1, 8, 3), (2, 7, 10), (2, 6, 0))
    assert code.run_as(runs) == 2 + 3 * 8 + 10 * 7
    assert code.runs([(1, 3), (2, 10)]) == code.runs([(1, 3), (2, 10), (3, 0)]) == code.runs([]) == ()
    assert code.runs([(1, 3)]) == ((1, 8, 3), (2, 7, 3), (2, 6, 3))  # the compiler's own, within what is said


def test_kernels_that_say_how_often_their_loops_run():
    codes = {"attention.7": read_code(NESTED, SLOTS)}
    text = entry(KERNEL_CALL, IN_PLACE)
    for loops, run, note in (
        (((1, 3), (2, 10), (2, 5)), 2 + 24 + 70 + 30, CONDITIONS),
        (((1, 3), (2, 10)), codes["attention.7"].bundles, KERNELS),
    ):
        made = schedule(text, codes, kernel=lambda _, own=loops: Least(50e-9, 40, own))
        kernel = made.ops["attention"]
        assert (kernel.read, kernel.run) == (40, run)
        assert kernel.seconds == pytest.approx(max(run, 50) * 1e-9)
        assert (note in made.notes, len({KERNELS, CONDITIONS} & made.notes.keys())) == (True, 1)


def test_a_kernel_says_what_it_does():
    """In its metadata, a line each; here two rows of two blocks of 512 keys each, of which one has but half a page."""
    cut = Cut(size=1, steps=4, keys=512, page_size=64, page_bytes=1000, blanked=64, window=0)
    lines = ",\n".join(f'"{name}":"{number}"' for name, number in cut.metadata.items())
    call = KERNEL_CALL.replace("attention.7", "ragged_paged_attention.7")
    call += f", frontend_attributes={{kernel_metadata={{\n{lines}\n}}}}"
    text = entry(f"  %z = bf16[8]{{0:S(1)}} fusion(%x), {cost(5)}\n{call}", IN_PLACE)
    bundles = "".join(f"0x{i} LB: {'>' * depth} {{ %s1 = smov 0 }}\n" for i, depth in enumerate((1, 2, 2, 3, 3, 3)))
    codes = {"ragged_paged_attention.7": read_code(bundles)}
    figures = profiled(text, codes, False, Bound(1, CHIP, 1.0, 1.0, 0.0), [(1, 1024), (1, 992)])
    (op,) = (op for op in figures["ops"] if op["op"] == "ragged_paged_attention")
    pages = 16 + 16
    times = [2, 8, 4, pages - 8, pages, 1]
    assert [loop[2] for loop in op["kernel"][0]["loops"]] == times
    assert (op["bundles_run"], op["bytes_read"]) == (sum(times), 1000 * pages)


def test_kernels():
    """One that reads the cache takes what it is said to, or its bundles if these are more."""
    codes = {"attention.7": read_code(BUNDLES, SLOTS, 500)}
    for seconds, expected in ((1e-6, 2002e-9), (5e-6, 5e-6)):
        made = schedule(entry(KERNEL_CALL, IN_PLACE), codes, kernel=lambda _, own=seconds: Least(own, 40))
        kernel = made.ops["attention"]
        assert (kernel.read, kernel.written, kernel.unknown, kernel.bundles, kernel.run) == (40, 0, 1, 6, 2002)
        assert kernel.seconds == pytest.approx(expected)
        assert kernel.fullest == ("VALU", 0.75)
        assert KERNELS in made.notes


def test_bundles_in_the_place_of_cycles():
    text = entry(f"  ROOT %a = bf16[8,100]{VMEM} fusion(%x), {cost(5000, (3,))}")
    codes = {"a": read_code(BUNDLES, SLOTS)}
    assert schedule(text, codes).seconds == pytest.approx(5000e-9)
    assert schedule(text, codes, by_bundles=True).seconds == pytest.approx((2 + 3 * 4) * 1e-9)
    assert schedule(text, codes).ops["norm"].binds(CHIP) == "vector"


def test_a_step_of_a_loop():
    """What decodes is told for a step, and what a call does besides on its own; beside the bound."""
    body = f"""
  %before = bf16[8]{{0:S(1)}} fusion(%x), {cost(700)}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[10,100]) tuple(%zero, %v)
  ROOT %loop = (s32[], bf16[10,100]) while(%start), condition=%cond, body=%body"""
    cond = "%cond (t: s32[]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}"
    text = entry(body, LOOP.format(name="body", cost=cost(4000)), cond)
    figures = profiled(text, {}, True, Bound(1, CHIP, 1.0, 2000.0, 0.0))
    assert figures["seconds"] == pytest.approx(4e-6)
    assert figures["call_seconds"] == pytest.approx(0.7e-6)
    assert figures["ratio"] == pytest.approx(2)
    assert (figures["bound_binds"], figures["seconds_by_bundles"]) == ("memory", None)
    assert [(op["op"], op["cycles"]) for op in figures["ops"]] == [("mlp.down", 4000)]
    assert "this libtpu does not write its bundles down" in figures["notes"]


def test_a_compiler_without_estimates():
    text = entry(f"  ROOT %a = bf16[8,100]{VMEM} fusion(%x, %w)")
    with pytest.raises(ValueError, match=r"writes no estimated cycles into its programs"):
        profiled(text, {}, False, Bound(1, CHIP, 1.0, 1.0, 0.0))
