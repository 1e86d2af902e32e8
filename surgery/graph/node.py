"""Graph nodes: inert descriptions of whole checkpoints.

A node knows its inputs, its space (weights or delta) and, once asked, the table of its tensors: name -> expression. Nothing is
read but headers. Everything else (plans, pricing, running, printing) visits nodes and expressions from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from surgery.checkpoint.source import Source
from surgery.checkpoint.structure import Structure, structure_of
from surgery.checkpoint.ties import declared_ties, is_token_embedding, tie_flag
from surgery.checkpoint.vocabulary import vocabulary_rows
from surgery.errors import Refused
from surgery.graph.expr import Agree, Expr, Read


class Everywhere(set[str]):
    """All names: a delta without a base is zero wherever it has no tensor."""

    def __contains__(self, name: object) -> bool:
        return True


class Node:
    """Base. label: the step's name in a recipe, else generated. where: parameter or "" -> `file:line:col` for messages."""

    inputs: Sequence[Node] = ()
    space = "weights"
    verb = "NODE"
    notes: Sequence[str] = ()  # what the plan tells the user about this node

    def __init__(self, label: str | None = None, where: Mapping[str, str] | None = None) -> None:
        self.label, self.where = label, where or {}
        self.dropped: dict[str, str] = {}  # tensors of the inputs that go no further: name -> reason

    @cached_property
    def tensors(self) -> dict[str, Expr]:
        """name -> expression, in output order. Raises Refused if the node cannot be made."""
        return self._build()

    def _build(self) -> dict[str, Expr]:
        raise NotImplementedError

    @cached_property
    def structure(self) -> Structure:
        """Blocks and depth, derived from the names and shapes of the tensors."""
        return structure_of({name: e.shape for name, e in self.tensors.items()})

    @cached_property
    def left_out(self) -> set[str]:
        """Tensors that a select or drop here or below left out on purpose; all others, where every input is an adapter."""
        below = [node.left_out for node in self.inputs]
        if below and all(isinstance(names, Everywhere) for names in below):
            return Everywhere()
        return {name for names in below for name in names}

    @property
    def config(self) -> dict[str, Any] | None:
        """The config.json that describes these tensors: the first input's, edited where a node changes what it says."""
        return self.inputs[0].config if self.inputs else None

    @property
    def donor(self) -> Source | None:
        """The source whose config, tokenizer and other files go with these tensors."""
        return self.inputs[0].donor if self.inputs else None

    def stand_in(self, name: str) -> Expr | None:
        """The expression of the tensor that `name` is declared tied to, where `name` itself is not stored."""
        for node in self.inputs:
            canonical = node.tied_to(name)
            if canonical is not None:
                return self.tensors.get(canonical)
        return None

    def tied_to(self, name: str) -> str | None:
        """The name that `name` is declared to be the same tensor as."""
        for node in self.inputs:
            canonical = node.tied_to(name)
            if canonical is not None:
                return canonical
        return None

    @property
    def text(self) -> str:
        """What plans print after the verb."""
        return ""

    @property
    def identity(self) -> str:
        """What, beside the inputs, this node computes: text that goes into the content hash."""
        return self.text

    @cached_property
    def token(self) -> str:
        """Content hash: equal for equal computations over equal headers."""
        digest = hashlib.sha256(f"{self.verb}\0{self.identity}".encode())
        for node in self.inputs:
            digest.update(node.token.encode())
        return digest.hexdigest()

    def refuse(self, message: str, *, hint: str | None = None, key: str = "") -> Refused:
        place = self.where.get(key) or self.where.get("", "")
        prefix = f"{place}: " if place else ""
        step = f"{self.label}: " if self.label and self.where else ""
        return Refused(f"{prefix}{step}{message}", hint=hint)


class SourceNode(Node):
    """A checkpoint on disk."""

    verb = "READ"
    as_stored = True  # its tensors are those of the file, byte for byte

    def __init__(self, source: Source, label: str | None = None, where: Mapping[str, str] | None = None) -> None:
        super().__init__(label or source.label, where)
        self.source = source
        self.claims: list[Agree] = []  # pairs that config declares tied although both are stored: verified in a run

    def _build(self) -> dict[str, Expr]:
        made: dict[str, Expr] = {name: Read(self.source, stored, self) for name, stored in self.source.tensors.items()}
        for alias in self._stored_aliases():
            canonical = self.ties[alias]
            self.claims.append(Agree([made[alias], made[canonical]], self))
            self.dropped[alias] = f"tied: config declares it equal to {canonical}"
            del made[alias]
        return made

    def _stored_aliases(self) -> list[str]:
        """Names that config declares tied to another stored one. Asks about ties only where there can be any."""
        tensors, config = self.source.tensors, self.source.config
        if not tie_flag(config):
            return []
        shapes = {name: t.shape for name, t in tensors.items()}
        tables = {shapes[n] for n, axis in vocabulary_rows(shapes, config).items() if axis == 0 and is_token_embedding(n)}
        if not any(shape in tables and not is_token_embedding(n) for n, shape in shapes.items()):
            return []
        return [a for a, c in self.ties.items() if a in tensors and c in tensors and shapes[a] == shapes[c]]

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def donor(self) -> Source:
        return self.source

    @cached_property
    def ties(self) -> dict[str, str]:
        return declared_ties(list(self.source.tensors), self.source.config) | self.source.aliases

    def tied_to(self, name: str) -> str | None:
        return self.ties.get(name)

    def stand_in(self, name: str) -> Expr | None:
        canonical = self.ties.get(name)
        return None if canonical is None else self.tensors.get(canonical)

    @property
    def text(self) -> str:
        return self.label or ""

    @property
    def identity(self) -> str:
        return f"{self.source.label}\0{self.source.fingerprint}"


def ancestry(root: Node) -> list[Node]:
    """All nodes below and including `root`, inputs before users, each once."""
    found: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) not in found:
            for inner in node.inputs:
                visit(inner)
            found[id(node)] = node

    visit(root)
    return list(found.values())


def sources_of(root: Node) -> list[SourceNode]:
    """Every source, in the order of first use."""
    return [n for n in ancestry(root) if isinstance(n, SourceNode)]
