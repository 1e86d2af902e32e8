"""A plan: everything that a run will do, known from headers alone.

One program per output tensor, the statistics that have to be collected first, where every byte will lie, what it costs, and
what became of every input tensor. Making a plan reads no tensor data and does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from surgery.checkpoint.dtypes import F64, DType, float_dtype
from surgery.checkpoint.layout import Entry, Layout, lay_out
from surgery.checkpoint.source import FileState, Source
from surgery.engine.pieces import PIECE
from surgery.engine.settings import Settings
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Agree, Applied, Derived, Expr, Literal, Mapped, Measure, Read, walk
from surgery.graph.node import Node, SourceNode, ancestry, sources_of
from surgery.graph.scaled import dequantised
from surgery.ops.eager import row_length
from surgery.version import __version__


@dataclass(frozen=True)
class Program:
    """How one output tensor is computed. measures: statistics to collect over this tensor first, in order."""

    name: str
    expr: Expr
    dtype: DType
    measures: tuple[Measure, ...]
    wide: bool  # float64 arithmetic
    whole: bool  # needs the whole tensor at once
    shared: frozenset[int]  # expressions used more than once: kept while a piece is computed
    below: tuple[Expr, ...]  # every expression that it is made of, arguments first, each once

    @property
    def shape(self) -> tuple[int, ...]:
        return self.expr.shape

    @property
    def read(self) -> int:
        """Stored bytes of the tensors that it is made of."""
        return sum(e.stored.nbytes for e in self.below if type(e) is Read)

    @property
    def nbytes(self) -> int:
        return prod(self.expr.shape) * self.dtype.size

    @property
    def copies(self) -> bool:
        """True if stored bytes are handed on unchanged."""
        return isinstance(self.expr, Read) and self.expr.dtype == self.dtype


@dataclass(frozen=True)
class Use:
    """What became of one source's tensors."""

    source: Source
    computed: int  # tensors that take part in arithmetic
    passed: int  # tensors copied unchanged
    refused: dict[str, str]  # name -> why it is not in the output

    @property
    def total(self) -> int:
        return self.computed + self.passed + len(self.refused)


@dataclass(frozen=True)
class Price:
    """Bytes and memory. read counts every pass; passes holds (what, bytes) of those before the last."""

    read: int
    written: int
    passes: tuple[tuple[str, int], ...]
    whole_tensor: int  # largest working set of a tensor that cannot be streamed
    buffers: int  # work arrays that a worker needs per piece
    torch: bool
    streams: bool = False  # inputs are read over the network, ahead of the work
    lanes: int = 0  # what a worker needs to hand pieces to a device, and
    beside: int = 0  # what making a piece of a derived tensor takes beside it
    context: int = 0  # what the device's driver takes of this process's memory
    gathered: int = 0  # what the search for a threshold over the model holds between its pieces, and
    gathers: int = 0  # one over a single tensor, of which every worker may have begun one


@dataclass
class Plan:
    """See the module. `claims`: tensors declared equal, checked first when the plan is run."""

    node: Node
    settings: Settings
    programs: list[Program]
    prepasses: list[list[Measure]]  # model-wide statistics with what must precede each, in order
    layout: Layout
    uses: list[Use]
    price: Price
    claims: list[Agree]
    config: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def donor(self) -> Source | None:
        return self.node.donor

    @cached_property
    def by_name(self) -> dict[str, Program]:
        return {p.name: p for p in self.programs}

    @property
    def files(self) -> dict[str, FileState]:
        """Every input file as it was when its header was read."""
        return {path: state for use in self.uses for path, state in use.source.files.items()}

    @cached_property
    def token(self) -> str:
        """Equal for plans that write the same bytes from the same, unchanged files: what a resumed run must match."""
        state = sorted((p, s.size, s.mtime_ns) for p, s in self.files.items())
        text = repr((__version__, self.node.token, self.settings.identity, state))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        from surgery.engine.render import plan_text

        return plan_text(self)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `--json`."""
        from surgery.engine.render import plan_dict

        return plan_dict(self)


def make_plan(node: Node, settings: Settings | None = None) -> Plan:
    """Plan the checkpoint that `node` describes. Raises Refused for whatever would go wrong later."""
    from surgery.engine import check
    from surgery.engine.price import price

    settings = settings or Settings()
    tensors = node.tensors
    if not tensors:
        raise node.refuse("no tensor is left: nothing would be written")
    dtype = None if settings.dtype is None else _dtype(settings)
    if dtype is not None and not dtype.is_scaled_code and (weights := dequantised(node)) is not node:
        node, tensors = weights, weights.tensors
    chosen = _chosen(node, settings)
    programs = [program_of(name, _integers(name, e, chosen), dtype, settings) for name, e in tensors.items()]
    prepasses = model_wide(programs)
    early = {id(m) for group in prepasses for m in group}
    programs = [_without(p, early) for p in programs]
    layout = lay_out((Entry(p.name, p.dtype, p.shape) for p in programs), settings.shard_size)
    claims = [c for s in sources_of(node) for c in s.claims]
    plan = Plan(
        node=node,
        settings=settings,
        programs=programs,
        prepasses=prepasses,
        layout=layout,
        uses=_account(node, programs, claims),
        price=price(programs, prepasses, layout.size),
        claims=claims,
    )
    check.check(plan)
    plan.warnings += dict.fromkeys(note for n in ancestry(node) for note in n.notes)
    return plan


def _dtype(settings: Settings) -> DType:
    try:
        return float_dtype(settings.dtype or "")
    except Refused as problem:
        raise Refused(f"{settings.where.get('dtype', 'output')}: {problem.message}", hint=problem.hint) from None


def _needs_whole(e: Applied) -> bool:
    """A matrix operator, or one of rows where a row is longer than a piece."""
    return e.op.locality == "matrix" or (e.op.locality == "rows" and row_length(e.shape) > PIECE)


class Traits(NamedTuple):
    """How expressions have to be evaluated: in float64, as whole tensors, and which are used more than once."""

    wide: bool
    whole: bool
    shared: frozenset[int]


def traits(exprs: Sequence[Expr]) -> Traits:
    """What evaluating `exprs` together takes."""
    return _traits(exprs, walk(exprs))


def _traits(exprs: Sequence[Expr], below: Iterable[Expr]) -> Traits:
    seen: set[int] = set()
    shared: set[int] = set()
    wide = whole = False
    for e in exprs:
        (shared if id(e) in seen else seen).add(id(e))
    for e in below:
        for arg in e.args:
            (shared if id(arg) in seen else seen).add(id(arg))
        whole = whole or isinstance(e, Mapped) or (isinstance(e, Applied) and _needs_whole(e))
        whole = whole or (isinstance(e, Derived) and e.whole)
        wide = wide or (isinstance(e, Read | Literal) and e.dtype is F64)
    return Traits(wide, whole, frozenset(shared))


def program_of(name: str, expr: Expr, dtype: DType | None, settings: Settings) -> Program:
    below = tuple(walk([expr]))
    wide, whole, shared = _traits([expr], below)
    measures = tuple(e.measure for e in below if isinstance(e, Applied) and e.measure is not None)
    out = dtype if dtype is not None and expr.dtype.is_float else expr.dtype
    return Program(name, expr, out, measures, wide or settings.precision == "float64", whole, shared, below)


def _without(program: Program, early: set[int]) -> Program:
    kept = tuple(m for m in program.measures if id(m) not in early)
    if len(kept) == len(program.measures):
        return program
    return replace(program, measures=kept)


def model_wide(programs: Sequence[Program]) -> list[list[Measure]]:
    """For each model-wide statistic: the per-tensor ones below it that are not collected yet, then itself."""
    done: set[int] = set()
    groups = []
    for program in programs:
        for measure in program.measures:
            if measure.scope == "global" and id(measure) not in done:
                below = [e.measure for e in walk(measure.parts) if isinstance(e, Applied) and e.measure is not None]
                group: list[Measure] = []
                for m in [*(m for m in below if m is not measure), measure]:
                    if id(m) not in done:
                        done.add(id(m))
                        group.append(m)
                groups.append(group)
    return groups


def _chosen(node: Node, settings: Settings) -> SourceNode | None:
    if settings.integers is None:
        return None
    return _source(node, settings.integers, settings.where.get("integers", "output.integers"))


def _source(node: Node, label: str, where: str) -> SourceNode:
    nodes = sources_of(node)
    named = [source for source in nodes if source.label == label]
    if len(named) > 1:
        raise Refused(f"{where}: {len(named)} inputs are called `{label}`", hint="open(..., name=...) tells them apart")
    if named:
        return named[0]
    raise Refused(
        f"{where}: `{label}` is not a model of this recipe", hint=did_you_mean(label, [s.label or "" for s in nodes])
    )


def _integers(name: str, expr: Expr, chosen: SourceNode | None) -> Expr:
    if chosen is None or not isinstance(expr, Agree):
        return expr
    return chosen.tensors.get(name, expr)


def _account(node: Node, programs: Iterable[Program], claims: Sequence[Agree]) -> list[Use]:
    """Every input tensor is computed with, passed, or refused with a reason."""
    reached: dict[int, dict[str, bool]] = {}
    for program in programs:
        for e in program.below:
            if isinstance(e, Read):
                mine = reached.setdefault(id(e.source), {})
                mine[e.stored.name] = mine.get(e.stored.name, False) or not program.copies
    nodes = ancestry(node)
    uses = []
    for source_node in sources_of(node):
        source = source_node.source
        mine = reached.get(id(source), {})
        users = [n for n in nodes if n is source_node or any(s is source_node for s in sources_of(n))]
        refused = {}
        for name in source.tensors:
            if name not in mine:
                reason = next((n.dropped[name] for n in users if name in n.dropped), None)
                refused[name] = reason or "has no weight in the result"
        for alias, canonical in source.aliases.items():
            refused[alias] = f"tied: the same bytes as {canonical}"
        computed = sum(mine.values())
        uses.append(Use(source, computed, len(mine) - computed, refused))
    return uses


def passes_of(measures: Iterable[Measure]) -> Mapping[str, int]:
    """Bytes read to collect statistics, by operator."""
    found: dict[str, int] = {}
    for m in measures:
        reads = {id(e): e for part in m.parts for a in part.args for e in walk([a]) if isinstance(e, Read)}
        found[m.op.name] = found.get(m.op.name, 0) + sum(e.stored.nbytes for e in reads.values())
    return found
