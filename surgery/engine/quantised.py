"""Checkpoints whose tensors are codes: recognised, and refused with what to do where an operator would compute with them."""

from __future__ import annotations

from surgery.checkpoint.source import Source
from surgery.engine.plan import Plan, Program
from surgery.errors import Refused
from surgery.graph.expr import Derived, Read
from surgery.graph.packed import packed_codes, packing
from surgery.graph.scaled import Dequantised

_SCALES = ("_scale_inv", "_scale", ".scale", "_scales", ".scales")


def check_quantised(plan: Plan) -> None:
    """Codes of a quantised checkpoint are no numbers to compute with. Raises Refused."""
    packed = {id(use.source): packing(use.source) for use in plan.uses}
    if not any(packed.values()) and not any(_may_be_codes(use.source) for use in plan.uses):
        return
    for program in plan.programs:
        if program.copies or _rebuilt(program):
            continue
        exprs = program.below
        scaled = {id(a) for e in exprs if isinstance(e, Dequantised) for a in e.args}
        for e in exprs:
            if isinstance(e, Read) and id(e) not in scaled:
                how = packed.get(id(e.source))
                if how is not None:
                    raise packed_codes(e.source, how, e.stored.name)
                _scaled(e)


def _may_be_codes(source: Source) -> bool:
    return any(t.dtype.is_scaled_code or not t.dtype.is_float for t in source.tensors.values())


def _scaled(e: Read) -> None:
    """Codes whose scale is not understood."""
    source, name = e.source, e.stored.name
    stem = name.removesuffix(".weight")
    scale = next((s for x in (name, stem) for end in _SCALES if (s := x + end) in source.tensors), None)
    if scale is not None and (e.stored.dtype.is_scaled_code or not e.stored.dtype.is_float):
        raise Refused(
            f"{source.label}: `{name}` holds {e.stored.dtype} codes that need `{scale}`; they are not weights yet",
            hint="dequantise the checkpoint to bfloat16 first; only copying such tensors unchanged is safe",
        )


def _rebuilt(program: Program) -> bool:
    """True if stored bytes are unpacked as they were: a delta package on its base."""
    return isinstance(program.expr, Derived) and program.expr.exact and program.expr.dtype == program.dtype
