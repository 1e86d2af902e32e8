"""Finding the tensors that an adapter changes in a base, and what they become."""

from __future__ import annotations

from surgery.adapter.factors import Change, Layout, bias_of, expr_of, low_rank, wide
from surgery.adapter.keys import Target
from surgery.adapter.lowrank import Factor, LowRank, Stacked
from surgery.adapter.match import Experts, Names, experts_of, is_stacked, weight_of
from surgery.adapter.source import Adapter
from surgery.adapter.weights import Dora, RowsReplaced
from surgery.checkpoint.ties import is_token_embedding
from surgery.errors import Refused
from surgery.graph.expr import Expr, Padded, weighted
from surgery.graph.node import Node, SourceNode, sources_of

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # linear layers stored as (in, out)


class Resolver:
    """Finds the tensors that an adapter changes in a base, and checks that it fits."""

    def __init__(self, node: Node, base: Node, adapter: Adapter, file: SourceNode) -> None:
        """node: for messages, and as the origin of expressions. `changes` fills in layouts."""
        self.node, self.base, self.adapter, self.file = node, base, adapter, file
        self.config, self.contents = adapter.config, adapter.contents
        self.layouts: dict[str, Layout] = {}  # of the tensors that have factors
        self.names = Names({n: e.shape for n, e in base.tensors.items()}, base.tied_to)
        self.made: dict[str, Change] = {}
        self.unmatched: list[str] = []
        self.full = {self._name(t, k): expr_of(self.file, k) for t, k in self.contents.full.items()}
        self.frozen = {self._name(t, k): expr_of(self.file, k) for t, k in self.contents.frozen.items()}

    def changes(self) -> dict[str, Change]:
        parameters = self.config.target_parameters
        stacks: dict[str, list[Target]] = {}
        for target in self.contents.targets:
            if is_stacked(self.names, target, parameters):
                stacks.setdefault(target.module, []).append(target)
            else:
                self._matrix(target, weight_of(self.names, target, parameters))
        for targets in stacks.values():
            for placed in self._experts(targets):
                self._stack(placed)
        self._tensors()
        if self.unmatched:
            raise self._unmatched()
        self._untie()
        return self.made

    # -- factors ---------------------------------------------------------------------------------------------------------

    def _matrix(self, target: Target, name: str | None) -> None:
        if name is None:
            self.unmatched += target.keys[:1]
            return
        before = self._base(name)
        start = before
        if name in self.frozen and self.frozen[name].shape != before.shape:
            start = self.frozen[name]  # a vocabulary that grew before training
        turned = self._turned(target, start.shape, name)
        low = low_rank(self.node, self.adapter, self.file, target, turned)
        if low.shape != start.shape:
            raise self._misfit(name, low.shape, start.shape)
        stored_by_columns = turned or target.embedding
        if target.magnitude is not None:
            magnitude = expr_of(self.file, target.magnitude)
            wanted = start.shape[1 if stored_by_columns else 0]
            if magnitude.numel != wanted:
                raise self._misfit(f"magnitude of {name}", magnitude.shape, (wanted,))
            self._put(name, before, Dora(start, low, magnitude, self.node, transposed=stored_by_columns))
        else:
            new = weighted([1.0, 1.0], [start, low], start.shape, before.dtype, self.node)
            self._put(name, before, new, low if start is before else None)
        self.layouts[name] = Layout(target.module, name.rpartition(".")[2], target.embedding, turned)
        if target.bias is not None:
            self._bias(target)

    def _turned(self, target: Target, shape: tuple[int, ...], name: str) -> bool:
        """True if the weight is stored as (in, out). Where shapes do not tell, the config of adapter or base does."""
        if target.embedding or len(shape) != 2:
            return False
        a, b = expr_of(self.file, target.a or ""), expr_of(self.file, target.b or "")
        if len(a.shape) != 2 or len(b.shape) != 2:
            return False
        plain, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        if plain != turned:
            return shape == turned
        conv1d = (self.base.config or {}).get("model_type") in CONV1D and self.base.structure.block(name) is not None
        return conv1d or (self.config.fan_in_fan_out and self.base.config is None)

    def _bias(self, target: Target) -> None:
        name = self.names.find(f"{target.module}.bias")
        if name is None:
            self.unmatched.append(target.bias or "")
            return
        before, delta = self._base(name), bias_of(self.node, self.adapter, self.file, target)
        if before.shape != delta.shape:
            raise self._misfit(name, delta.shape, before.shape)
        new = weighted([1.0, 1.0], [before, delta], before.shape, before.dtype, self.node)
        self._put(name, before, new, delta)

    def _experts(self, targets: list[Target]) -> list[Experts]:
        def factors(target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
            pair = expr_of(self.file, target.a or "").shape, expr_of(self.file, target.b or "").shape
            if len(pair[0]) != 2 or len(pair[1]) != 2:
                raise ValueError(f"`{target.label}`: factors {list(pair[0])} and {list(pair[1])} are no matrices")
            return pair

        kind = (self.base.config or {}).get("model_type")
        try:
            return experts_of(
                self.names, targets, factors, self.config.rank, self.config.target_parameters, kind, self.adapter.label
            )
        except Refused as problem:
            raise self.node.refuse(problem.message, hint=problem.hint or self._trained_on()) from None

    def _stack(self, placed: Experts) -> None:
        """PEFT: A holds the experts' factors one after the other, B has them interleaved: column k * experts + e."""
        target, count, rank = placed.target, placed.count, placed.rank
        a, b = expr_of(self.file, target.a or ""), expr_of(self.file, target.b or "")
        inner, outer = a.shape[1], b.shape[0]
        scale = self.config.scale(f"{target.module}.{placed.parameter}", rank)
        lines = [Factor(b, outer, rank, b.shape[1], count, e) for e in range(count)]
        columns = [Factor(a, inner, rank, 1, inner, e * rank * inner) for e in range(count)]
        if placed.stacked is not None:
            before = self._base(placed.stacked)
            pairs = zip(columns, lines, strict=True) if placed.transposed else zip(lines, columns, strict=True)
            parts = [LowRank(left, right, scale, self.node) for left, right in pairs]
            delta = Stacked(parts, parts[0].dtype, self.node)
            new = weighted([1.0, 1.0], [before, delta], before.shape, before.dtype, self.node)
            self._put(placed.stacked, before, new, delta)
            self.layouts[placed.stacked] = Layout(target.module, placed.parameter, False, placed.transposed)
            return
        for e, names in enumerate(placed.apart):
            first = 0
            for name in names:
                before = self._base(name)
                height = before.shape[0]
                low = LowRank(lines[e].part(first, height), columns[e], scale, self.node)
                new = weighted([1.0, 1.0], [before, low], before.shape, before.dtype, self.node)
                self._put(name, before, new, low)
                self.layouts[name] = Layout(name.removesuffix(".weight"))
                first += height

    # -- tensors in full -------------------------------------------------------------------------------------------------

    def _tensors(self) -> None:
        for name, new in self.full.items():
            if name not in self.names.shapes and self.base.tied_to(name) is None:
                continue  # already among the unmatched
            before = self._base(name)
            if new.shape[1:] != before.shape[1:] or (new.shape != before.shape and new.shape[:1] < before.shape[:1]):
                raise self._misfit(name, new.shape, before.shape)
            self._put(name, before, new)
        for module, key in self.contents.tokens.items():
            found = self.names.find(f"{module}.weight")
            if found is None:
                self.unmatched.append(key)
                continue
            before, rows = self._base(found), expr_of(self.file, key)
            indices = self.config.token_rows(module)
            if indices is None or len(indices) != rows.shape[0] or rows.shape[1:] != before.shape[1:]:
                raise self._misfit(found, rows.shape, (len(indices or []), *before.shape[1:]))
            if indices and max(indices) >= before.shape[0]:
                raise self.node.refuse(
                    f"the adapter trains row {max(indices)} of `{found}`, which has {before.shape[0]} rows",
                    hint="add its tokens to the base first (resize the embeddings)",
                )
            self._put(found, before, RowsReplaced(before, rows, indices, self.node))

    # -- bookkeeping -----------------------------------------------------------------------------------------------------

    def _put(self, name: str, before: Expr, new: Expr, delta: Expr | None = None) -> None:
        if name in self.made:
            raise self.node.refuse(f"{self.adapter.label} changes `{name}` twice")
        if delta is None:
            old = before if before.shape == new.shape else Padded(before, new.shape, self.node)
            delta = weighted([1.0, -1.0], [new, old], new.shape, wide(new, before), self.node)
        self.made[name] = Change(new, delta)

    def _base(self, name: str) -> Expr:
        found = self.base.tensors.get(name)
        if found is None:
            found = self.base.stand_in(name)
        if found is None:
            raise self.node.refuse(f"`{name}` is not in {self.base.label}")
        if not found.dtype.is_float:
            raise self.node.refuse(f"`{name}` is {found.dtype} in {self.base.label}; an adapter changes floats")
        return found

    def _name(self, tensor: str, key: str) -> str:
        found = self.names.find(tensor)
        if found is None:
            self.unmatched.append(key)
        return found or tensor

    def _untie(self) -> None:
        """Where one of two tied tensors is changed, the other is not: from here on they are two."""
        changed = [n for n in self.made if is_token_embedding(n) and n in self.base.tensors]
        if not changed or self.config.data.get("ensure_weight_tying") or self.contents.tokens:
            return
        for source in sources_of(self.base):
            for alias, canonical in source.ties.items():
                if canonical in changed and alias not in self.made and alias not in self.base.tensors:
                    before, new = self.base.tensors[canonical], self.made[canonical].new
                    if new.shape == before.shape:
                        zero = weighted([], [], before.shape, wide(before, before), self.node)
                        self.made[alias] = Change(before, zero)

    def _misfit(self, name: str, mine: tuple[int, ...], wanted: tuple[int, ...]) -> Refused:
        message = f"{self.adapter.label} is for another base: `{name}` is {list(mine)} in it and {list(wanted)} in "
        return self.node.refuse(f"{message}{self.base.label}", hint=self._trained_on())

    def _unmatched(self) -> Refused:
        keys = self.unmatched
        more = f" (and {len(keys) - 1} more, e.g. `{keys[-1]}`)" if len(keys) > 1 else ""
        message = f"{self.adapter.label}: `{keys[0]}` fits no tensor of {self.base.label}{more}"
        return self.node.refuse(message, hint=self._trained_on())

    def _trained_on(self) -> str:
        return f"it says it was trained on {self.config.base}" if self.config.base else "was it trained on another base?"
