"""Units of work: a phase is a list of tasks that may run in any order on any worker, then one conclusion.

A program is a job of several phases: one for each pass of each statistic it needs, and one that writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BF16
from surgery.engine import convert
from surgery.engine.blocks import Blocks
from surgery.engine.digest import combine, piece_digests
from surgery.engine.evaluate import Disagreement, Evaluator
from surgery.engine.pieces import WINDOW, pieces, segments
from surgery.engine.plan import Program, traits
from surgery.engine.profile import Profile
from surgery.errors import Refused
from surgery.graph.expr import Agree, Applied, Derived, Expr, Measure, Read, walk
from surgery.ops.eager import row_length
from surgery.ops.statistics import At

MAX_WINDOWS = 2048  # of WINDOW elements: many, because tensors differ more than elements of one do


class Phase:
    """`tasks` numbered from 0, `do` any of them, then `conclude`: the next phase, or None when the job is done."""

    tasks = 0

    def do(self, evaluator: Evaluator, task: int) -> int:
        """Carry out one task; returns bytes of progress."""
        raise NotImplementedError

    def conclude(self) -> Phase | None:
        raise NotImplementedError


class MeasurePhase(Phase):
    """One pass of a statistic over its tensors, repeated for as long as it asks for another."""

    def __init__(
        self, measure: Measure, *, wide: bool, lenient: bool, then: Callable[[], Phase | None], statistic: Any = None
    ) -> None:
        """statistic: one that has passes behind it; otherwise a fresh one."""
        self._measure, self._lenient, self._then = measure, lenient, then
        # becomes the measure's when it is concluded: an aborted run leaves nothing behind
        self._statistic = measure.start() if statistic is None else statistic
        found = traits([a for part in measure.parts for a in part.args])
        self._wide, self._whole, self._shared = wide or found.wide, found.whole, found.shared
        self._work: list[tuple[Applied, int, int]] = []
        self._blocks: dict[int, Blocks | None] = {}
        self._lay_out()

    def _lay_out(self) -> None:
        """The pieces of this pass; only a window of some of them if a sample is enough."""
        work = [(part, a, b) for part in self._measure.parts for a, b in pieces(part.shape, whole=self._whole)]
        if self._statistic.sampled:
            step = max(1, len(work) // MAX_WINDOWS)
            work = [(part, a, min(b, a + _window(part))) for part, a, b in work[::step]]
        self._work = work
        self._seen: list[tuple[At, Any] | None] = [None] * len(work)
        self._runs = segments(len(work))
        self.tasks = len(self._runs)

    def do(self, evaluator: Evaluator, task: int) -> int:
        size = 0
        for i in self._runs[task]:
            part, start, stop = self._work[i]
            evaluator.begin(start, stop, wide=self._wide, shared=self._shared)
            at = evaluator.at(part)
            try:
                seen = self._in_blocks(evaluator, part, at, stop)
                self._seen[i] = seen or (at, self._observed(evaluator, part, at, stop - start))
            except FloatingPointError:
                raise culprit(part, start, stop, evaluator) or _too_large(part) from None
            size += (stop - start) * sum(e.dtype.size for e in walk(part.args) if isinstance(e, Read))
        return size

    def _observed(self, evaluator: Evaluator, part: Applied, at: At, count: int) -> Any:
        statistic = self._statistic
        if not self._lenient and getattr(statistic, "takes_stored", False):  # `Stored`, whose isinstance costs more than a look
            pairs = evaluator.pairs(part.args)
            if pairs is not None:
                return statistic.observe_stored(pairs, count, at)
        inputs = [evaluator.values(a) for a in part.args]
        if self._lenient:
            inputs = [np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in inputs]
        return statistic.observe(inputs, at)

    def _in_blocks(self, evaluator: Evaluator, part: Applied, at: At, stop: int) -> tuple[At, Any] | None:
        """The same without leaving the cache, where the statistic and everything that it looks at can."""
        watching = None if self._lenient else getattr(self._statistic, "watch", None)
        watch = watching(at, stop - at.start) if watching is not None else None
        if watch is None:
            return None
        if id(part) not in self._blocks:
            row = at.row or 1 if part.op.locality == "rows" else 1
            self._blocks[id(part)] = Blocks.of(part.args, wide=self._wide, whole=self._whole, row=row)
        blocks = self._blocks[id(part)]
        if blocks is None or not blocks.watch(evaluator, watch, at.start, stop):
            return None
        return at, watch.seen()

    @property
    def statistic(self) -> Any:
        """The statistic as it stands before this pass."""
        return self._statistic

    def observations(self, task: int) -> list[tuple[At, Any] | None]:
        """What a task saw, for `accept` of the same phase in another process."""
        return [self._seen[i] for i in self._runs[task]]

    def accept(self, task: int, observations: list[tuple[At, Any] | None]) -> None:
        """Take over what a task saw elsewhere."""
        for i, seen in zip(self._runs[task], observations, strict=True):
            self._seen[i] = seen

    def conclude(self) -> Phase | None:
        if self._statistic.conclude(self._seen):
            self._measure.statistic = self._statistic
            return self._then()
        self._lay_out()
        return self


def _window(part: Applied) -> int:
    """Elements of a sample's window: whole rows, where something below needs those."""
    rows = [row_length(e.shape) for e in walk(part.args) if isinstance(e, Applied) and e.op.locality == "rows"]
    row = max(1, *rows) if rows else 1
    return max(row, WINDOW // row * row)


class Slice(Phase):
    """Some tasks of a phase, which goes on elsewhere."""

    def __init__(self, phase: Phase, chosen: Sequence[int]) -> None:
        self._phase, self._chosen = phase, chosen
        self.tasks = len(chosen)

    def do(self, evaluator: Evaluator, task: int) -> int:
        return self._phase.do(evaluator, self._chosen[task])

    def conclude(self) -> None:
        return None


def measured(
    measures: list[Measure], wide: bool, lenient: bool, then: Callable[[], Phase | None] | None
) -> Phase | None:
    """The phases that collect `measures` one after another, and `then` what follows."""
    if not measures:
        return then() if then else None
    rest = partial(measured, measures[1:], wide, lenient, then)
    return MeasurePhase(measures[0], wide=wide, lenient=lenient, then=rest)


class WritePhase(Phase):
    """Compute a program piece by piece and put it where it belongs."""

    def __init__(
        self,
        program: Program,
        *,
        put: Callable[[str, int, Any], None],
        finished: Callable[[Program, str], None],
        lenient: bool,
        expected: Callable[[Any], str | None],
        profile: Profile | None,
    ) -> None:
        self._program, self._put, self._finished = program, put, finished
        self._lenient, self._expected, self._profile = lenient, expected, profile
        self._pieces = pieces(program.shape, whole=program.whole)
        self._digests: list[list[bytes]] = [[]] * len(self._pieces)
        self._inputs: list[list[tuple[Any, bytes]]] = [[]] * len(self._pieces)
        self._runs = segments(len(self._pieces))
        self.tasks = len(self._runs)
        self._blocks: Blocks | None = None
        if program.dtype is BF16:
            self._blocks = Blocks.of_sum(program.expr, wide=program.wide, whole=program.whole)
        self._per_element = sum(e.dtype.size for e in program.below if isinstance(e, Read)) + program.dtype.size

    def do(self, evaluator: Evaluator, task: int) -> int:
        program, size = self._program, 0
        for i, out, sound in self.made(evaluator, self._runs[task]):
            start, stop = self._pieces[i]
            scratch = evaluator.scratch if out.size <= evaluator.scratch.size else np.empty(out.size, np.uint8)
            if not self._lenient and not (convert.is_finite(out, program.dtype, scratch) if sound is None else sound):
                raise culprit(program.expr, start, stop, evaluator) or _overflow(program)
            self._digests[i] = list(piece_digests(out, start, stop, program.shape, program.dtype.size))
            if self._profile is None:
                self._put(program.name, start * program.dtype.size, out)
            else:
                with self._profile.step("write", out.size):
                    self._put(program.name, start * program.dtype.size, out)
            size += (stop - start) * self._per_element
        return size

    def made(self, evaluator: Evaluator, run: Sequence[int]) -> Iterator[tuple[int, Any, bool | None]]:
        """Pieces of a run one after another: number, stored bytes, and whether all is finite (None: not known). The bytes are
        valid until the next one."""
        for i in run:
            yield i, *self.computed(evaluator, i)

    def computed(self, evaluator: Evaluator, i: int) -> tuple[Any, bool | None]:
        """A piece: stored bytes, and whether all is finite."""
        program = self._program
        evaluator.begin(*self._pieces[i], wide=program.wide, shared=program.shared)
        try:
            made = None if self._blocks is None else evaluator.in_blocks(self._blocks)
            out = evaluator.output(program.expr, program.dtype) if made is None else made
        except Disagreement as found:
            raise disagreement(program.name, found) from None
        self.saw(evaluator, i)
        return out, evaluator.sound

    def saw(self, evaluator: Evaluator, i: int) -> None:
        """Keep the digests of what was read for a piece."""
        if evaluator.seen:
            self._inputs[i] = list(evaluator.seen)

    def conclude(self) -> None:
        parts: dict[Any, list[bytes]] = {}
        for seen in self._inputs:
            for stored, digest in seen:
                parts.setdefault(stored, []).append(digest)
        for stored, digests in parts.items():
            wanted = self._expected(stored)
            if wanted is not None and wanted != combine(digests):
                raise Refused(
                    f"{stored.path}: `{stored.name}` is damaged: its bytes do not match the digest in surgery.json beside it",
                    hint="fetch or make this checkpoint again",
                )
        self._finished(self._program, combine([d for digests in self._digests for d in digests]))
        for measure in self._program.measures:
            measure.statistic = None


class ClaimPhase(Phase):
    """Tensors that are declared tied although both are stored: make sure that they are equal."""

    def __init__(self, claim: Agree) -> None:
        self._claim = claim
        self._pieces = pieces(claim.shape)
        self._runs = segments(len(self._pieces))
        self.tasks = len(self._runs)

    def do(self, evaluator: Evaluator, task: int) -> int:
        alias, canonical = self._claim.args
        assert isinstance(alias, Read) and isinstance(canonical, Read)
        for i in self._runs[task]:
            evaluator.begin(*self._pieces[i], wide=False)
            try:
                evaluator.raw(self._claim)
            except Disagreement:
                raise Refused(
                    f"{alias.source.label}: its config ties `{alias.stored.name}` to `{canonical.stored.name}`, "
                    "but the two differ",
                    hint=f'set "tie_word_embeddings": false in the config.json of {alias.source.location}',
                ) from None
        return 0

    def conclude(self) -> None:
        return None


def culprit(expr: Expr, start: int, stop: int, evaluator: Evaluator) -> Refused | None:
    """The input that holds a NaN or infinity in this piece, as an error; None if all inputs are finite."""
    below = {id(a) for e in walk([expr]) if isinstance(e, Derived) for a in walk(e.args)}
    ranges = [
        (e, a, min(b, e.numel))
        for e in walk([expr])
        if isinstance(e, Read) and e.dtype.is_float
        for a, b in (pieces(e.shape) if id(e) in below else [(start, stop)])
    ]
    for e, first, end in ranges:
        if end > first:
            evaluator.begin(first, end, wide=False)
            raw = evaluator.raw(e)
            if convert.is_finite(raw, e.dtype, np.empty(raw.size, np.uint8)):
                continue
            values = convert.typed(raw, e.dtype).astype(np.float64)
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            what = "NaN" if np.isnan(values[at]) else "infinity"
            return Refused(
                f"{e.source.label}: `{e.stored.name}` holds {what} (first at flat index {first + at}, in {e.stored.path})",
                hint="repair or drop that tensor; --allow-nonfinite carries such values along",
            )
    return None


def disagreement(name: str, found: Disagreement) -> Refused:
    first, second = found.first, found.second
    labels = [e.source.label if isinstance(e, Read) else e.name for e in (first, second)]
    return Refused(
        f"`{name}` is {first.dtype} and differs between {labels[0]} and {labels[1]}; such tensors are not averaged",
        hint=f"choose one: output: {{integers: {labels[0]}}}",
    )


def _overflow(program: Program) -> Refused:
    return Refused(
        f"`{program.name}`: the result does not fit {program.dtype} (largest finite value {program.dtype.largest:g})",
        hint="write a wider type: output: {dtype: bfloat16} or float32; or lower the weights",
    )


def _too_large(part: Applied) -> Refused:
    return Refused(
        f"{part.name}: norms of `{part.key.rpartition('/')[2]}` overflow {part.dtype}",
        hint="its values are far too large for weights; or compute in float64: output: {precision: float64}",
    )
