"""The reader of HLO text: shapes, calls, and how often loops run."""

import pytest

from ross_jax.plan.hlo import Shape, parse, trip_count

WINDOWED = """HloModule windowed

%body (state: (s32[], f32[8,4], u32[])) -> (s32[], f32[8,4], u32[]) {
  %state = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}, u32[]{:T(128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %kept = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %step = u32[]{:T(128)} get-tuple-element(%state), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%turn, %two)
  ROOT %out = (s32[], /*index=1*/f32[8,4], u32[]) tuple(%next, %kept, %step)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=DIRECTION
}

%condition (state.1: (s32[], f32[8,4], u32[])) -> pred[] {
  %state.1 = (s32[], f32[8,4], u32[]) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %more = pred[] fusion(%turn.1, %limit), kind=kLoop, calls=%less, metadata={op_name="a(b)/{c}"}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %zero = s32[] constant(0)
  %one = u32[] constant(1)
  %start = (s32[], f32[8,4], u32[]) tuple(%zero, %x, %one)
  %loop = (s32[], f32[8,4], u32[]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,4] get-tuple-element(%loop), index=1
}
"""
"""A loop that steps by 2, as XLA writes windowed products, its condition inside a fusion."""


def loops(text):
    module = parse(text)
    return module, [(c, each) for c in module.computations.values() for each in c if each.opcode == "while"]


@pytest.mark.parametrize(
    ("direction", "limit", "turns"),
    [("LT", 8, 4), ("LT", 9, 5), ("LE", 8, 5), ("LE", 9, 5), ("NE", 8, 4), ("LT", 0, 0)],
)
def test_windowed_loop(direction, limit, turns):
    text = WINDOWED.replace("DIRECTION", direction).replace("LIMIT", str(limit))
    module, [(computation, loop)] = loops(text)
    assert trip_count(module, computation, loop) == turns


def test_unknown_limit():
    text = WINDOWED.replace("DIRECTION", "LT").replace("%limit = s32[] constant(LIMIT)", "%limit = s32[] rng()")
    module, [(computation, loop)] = loops(text)
    assert trip_count(module, computation, loop) is None


def test_fields():
    module = parse(WINDOWED)
    state = module.computations["body"].instructions["state"]
    assert state.shapes == (Shape("s32", ()), Shape("f32", (8, 4)), Shape("u32", ()))
    assert sum(shape.bytes for shape in state.shapes) == 4 + 128 + 4
    assert state.in_vmem and not module.entry.instructions["x"].in_vmem
    more = module.computations["condition"].root
    assert (more.operands, more.attribute("kind"), more.op_name) == (("turn.1", "limit"), "kLoop", "a(b)/{c}")
    assert [each.name for each in module.called(more)] == ["less"]
    assert module.entry.instructions["loop"].called == ("condition", "body")
    assert Shape("bf16", (3, 5)).bytes == 30 and Shape("pred", (7,)).bytes == 7 and Shape("s4", (8,)).bytes == 4


def test_attributes_over_several_lines():
    """As XLA prints the metadata of splash attention's kernels."""
    text = """ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %k = f32[2] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof":"{\\"a\\": 1}"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %y = f32[2] add(%k, %x)
}
"""
    entry = parse(text).entry
    assert list(entry.instructions) == ["x", "k", "y"]
    assert entry.instructions["k"].op_name == "jit(f)/kernel"


def test_no_program():
    with pytest.raises(ValueError, match="no HLO text"):
        parse("HloModule empty")
