"""Two narrow networks as one wide one (MixtureGrowth, "diag")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint.ties import is_token_embedding
from surgery.checkpoint.vocabulary import vocabulary_rows
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Node
from surgery.graph.values import matches
from surgery.reshape.parts import Below, Beside, Diagonal

_DOUBLED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "n_embd", "n_head", "n_inner",
    "d_model", "d_ff", "num_heads",
)  # fmt: skip


class GrowNode(Node):
    """Matrices on a diagonal with zeros off it; what reads the data is stacked, what makes the output is halved and joined.

    reads, tables, writes: name globs of matrices whose columns are the data (rows are stacked), of tables looked up by index
    (columns are joined), and of output layers (columns are joined and halved, so that outputs are averaged; so are their
    biases). For language models tables and output layers are found by themselves.
    """

    verb = "GROW"

    def __init__(
        self,
        inputs: Sequence[Node],
        label: str | None,
        where: Mapping[str, str],
        *,
        reads: Sequence[str],
        tables: Sequence[str],
        writes: Sequence[str],
    ) -> None:
        super().__init__(label, where)
        self.inputs = tuple(inputs)
        self.roles = {"reads": tuple(reads), "tables": tuple(tables), "writes": tuple(writes)}

    def _build(self) -> dict[str, Expr]:
        first, second = (n.tensors for n in self.inputs)
        if first.keys() != second.keys():
            name = min(first.keys() ^ second.keys())
            raise self.refuse(f"`{name}` is in one of the two models only; grow takes two of one architecture", key="of")
        shapes = {n: e.shape for n, e in first.items()}
        vocabulary = vocabulary_rows(shapes, self.inputs[0].config)
        made = {}
        for role, globs in self.roles.items():
            for glob in globs:
                if not any(matches(glob, n) for n in first):
                    raise self.refuse(f"`{role}`: no tensor matches `{glob}`", key=role)
        for name, a in first.items():
            b = second[name]
            if a.shape != b.shape:
                raise self.refuse(f"`{name}` is {list(a.shape)} in one model and {list(b.shape)} in the other", key="of")
            made[name] = self._grown(name, a, b, vocabulary)
        return made

    def _grown(self, name: str, a: Expr, b: Expr, vocabulary: Mapping[str, int]) -> Expr:
        if len(a.shape) == 0 or not a.dtype.is_float:
            return a
        writes = self._is("writes", name) or (name in vocabulary and not is_token_embedding(name) and len(a.shape) == 2)
        if len(a.shape) == 1:
            writer = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
            if self._is("writes", name) or self._is("writes", writer) or name in vocabulary:
                return weighted([0.5, 0.5], [a, b], a.shape, a.dtype, self)
            return Below(a, b, self)
        if len(a.shape) != 2:
            raise self.refuse(f"`{name}` has {len(a.shape)} axes; grow takes vectors and matrices", key="of")
        if self._is("reads", name):
            return Below(a, b, self)
        if self._is("tables", name) or (name in vocabulary and not writes):
            return Beside(a, b, self)
        return Beside(a, b, self, 0.5) if writes else Diagonal(a, b, self)

    def _is(self, role: str, name: str) -> bool:
        return any(matches(glob, name) for glob in self.roles[role])

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        if config is None:
            return None
        made = {k: v * 2 if k in _DOUBLED and isinstance(v, int) else v for k, v in config.items()}
        heads = config.get("num_attention_heads")
        if "hidden_size" in config and heads:
            made["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        return made

    @property
    def text(self) -> str:
        return " ".join(f"{role}={','.join(globs)}" for role, globs in self.roles.items() if globs)
