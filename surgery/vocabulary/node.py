"""A model with its vocabulary rows where another tokenizer wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.config import with_vocab_size
from surgery.graph.expr import Expr
from surgery.graph.node import Node
from surgery.vocabulary.config import Move, moved_ids

if TYPE_CHECKING:
    from surgery.vocabulary.tokenizer import OutputTokenizer


class AlignedNode(Node):
    """The first input with the tables `made` in place of its own; the other inputs give rows to it. tied: what stands in for
    tables that only other models store (a head, here tied to the embedding), with rows from those.

    vocabulary: the output's tokenizer, the same object for all models that were aligned together. rows: of every table, None
    where it has none. move: from its token ids to the output's, None where they are the same. own: the config of the model
    whose tokenizer it is. text: for plans, what became of its rows.
    """

    text = ""
    verb = "ALIGN"

    def __init__(self, node: Node, others: Sequence[Node], vocabulary: OutputTokenizer, text: str = "") -> None:
        super().__init__(node.label, {})
        self.inputs = (node, *others)
        self.space = node.space
        self.vocabulary = vocabulary
        self.made: dict[str, Expr] = {}
        self.tied: dict[str, Expr] = {}
        self.rows: int | None = None
        self.move: Move | None = None
        self.own: Mapping[str, Any] | None = None
        self.text = text

    def _build(self) -> dict[str, Expr]:
        return {**self.inputs[0].tensors, **self.made}

    @cached_property
    def left_out(self) -> set[str]:
        return self.inputs[0].left_out

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        if config is None:
            return None
        if self.move is not None:
            config = moved_ids(config, self.move, self.own)
        return config if self.rows is None else with_vocab_size(config, self.rows)

    def tied_to(self, name: str) -> str | None:
        return self.inputs[0].tied_to(name)

    def stand_in(self, name: str) -> Expr | None:
        if name in self.tied:
            return self.tied[name]
        canonical = self.tied_to(name)
        return None if canonical is None else self.tensors.get(canonical)

    @property
    def identity(self) -> str:
        tables = [f"{name} {getattr(expr, 'identity', '')}" for name, expr in {**self.made, **self.tied}.items()]
        return "\n".join([self.vocabulary.identity, *tables])
