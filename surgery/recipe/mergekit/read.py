"""From a file of the dialect to a graph, and to the text of the native recipe that makes the same graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.settings import Settings
from surgery.errors import Refused, did_you_mean
from surgery.graph.node import Node
from surgery.recipe.mergekit.config import Merge, read_merge
from surgery.recipe.mergekit.documents import Part, read_documents
from surgery.recipe.mergekit.draft import Draft
from surgery.recipe.mergekit.references import Reference
from surgery.recipe.mergekit.slices import Lowering
from surgery.recipe.mergekit.text import reached, recipe_text
from surgery.recipe.mergekit.vocabulary import Aligned, Tokenizer, align_models, read_tokenizer


@dataclass(frozen=True)
class Dialect:
    """A file of the dialect, lowered. output: the native recipe's `output`; tokens: models that only bring tokens to it."""

    draft: Draft
    output: Mapping[str, Any]
    settings: Settings
    tokens: list[str]

    @property
    def node(self) -> Node:
        return self.draft.nodes[self.output["from"]]

    def native(self, folder: Path) -> str:
        """The native recipe that computes the same, for a file in `folder`."""
        notes = [f"differs from mergekit: {note}" for note in self.draft.notes]
        return recipe_text(self.draft, self.output, folder=folder, keep=self.tokens, comments=notes)


def read_dialect(path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> Dialect | None:
    """Read a file of the dialect; None if it is something else. Opens sources' headers. Raises Refused with file:line:col."""
    path = Path(path)
    parts = read_documents(path)
    if parts is None:
        return None
    _override(parts, overrides)
    read = {id(part): (read_merge(part), read_tokenizer(part)) for part in parts}
    order, final = _ordered([merge for merge, _ in read.values()])
    tokenizer = read[id(final.document)][1]
    for merge, other in read.values():
        if merge is not final and other.given:
            raise Refused(
                f"{merge.place(*other.path)}: tokens are chosen for the output, not on the way to it",
                hint="move this to the document that is the output",
            )
    lowered = _lowered(order, tokenizer, path.parent)
    changed = "".join(f"# --set {key}={value}\n" for key, value in overrides.items())
    return _finished(lowered, final, changed + parts[0].text)


@dataclass(frozen=True)
class _Lowered:
    lowering: Lowering
    result: str
    aligned: Aligned


def _lowered(order: Sequence[Merge], tokenizer: Tokenizer, folder: Path) -> _Lowered:
    """All documents as steps. Which models take part, and whose config leads, is known once that is done; both decide how
    tokens are aligned, which comes first: it is done again with what was found, until it stays."""
    leading: str | None = None
    kept: list[str] | None = None
    opened: dict[str, Node] = {}
    for _ in range(4):
        draft = Draft(reserved={"union", *(m.name for m in order if m.name)}, opened=opened)
        lowering = Lowering(draft, folder)
        aligned = Aligned({}, {}, [])
        if tokenizer.given:
            for merge in order:
                for model, place in _models(merge):
                    if not any(model.path == m.name for m in order):
                        lowering.label(model, place)
            aligned = align_models(lowering, order[-1], tokenizer, leading, kept)
        for merge in order[:-1]:
            lowering.named[merge.name or ""] = _intermediate(draft, merge, lowering.document(merge))
        result = lowering.document(order[-1])
        if result not in draft.steps:  # a model as it is
            result = draft.step("merged", "pass", result, {"": order[-1].place()})
        found = _leading(draft, result), reached(draft, [result])[1]
        if not tokenizer.given or found == (leading, kept):
            break
        leading, kept = found
    return _Lowered(lowering, result, aligned)


def _leading(draft: Draft, name: str) -> str:
    """The model whose config goes along: the first input of the first input, and so on."""
    while name in draft.steps:
        of = draft.steps[name]["of"]
        name = of if isinstance(of, str) else of[0]
    return name


def _finished(lowered: _Lowered, merge: Merge, text: str) -> Dialect:
    draft, result = lowered.lowering.draft, lowered.result
    node = draft.nodes[result]
    output: dict[str, Any] = {"from": result}
    if (dtype := merge.out_dtype or merge.dtype) is not None:
        output["dtype"] = dtype
    if merge.dtype == "float64":
        output["precision"] = "float64"
    output |= lowered.aligned.output
    if merge.base is not None and merge.base.path not in lowered.lowering.named:
        leading, location = _leading(draft, result), merge.base.location(lowered.lowering.folder)
        if draft.models[leading] != location:
            what = "config.json is" if "tokenizer" in output else "config.json and tokenizer are"
            draft.note(f"{what} `{leading}`'s, the first input's (mergekit: the base model's)")
    if draft.notes:
        node.notes = ["differs from mergekit (compat: mergekit follows it): " + "; ".join(draft.notes)]
    settings = Settings(
        dtype=output.get("dtype"),
        precision=output.get("precision", "float32"),
        recipe=text,
        where={"dtype": merge.place("out_dtype" if merge.out_dtype else "dtype")},
        **lowered.aligned.settings,
    )
    return Dialect(draft, output, settings, lowered.aligned.models)


def _intermediate(draft: Draft, merge: Merge, result: str) -> str:
    """A named document's result under its name; in compat rounded as a file would hold it."""
    assert merge.name is not None
    where = {"": merge.place()}
    dtype = merge.out_dtype or merge.dtype
    kinds = {e.dtype.torch for e in draft.nodes[result].tensors.values() if e.dtype.is_float}
    if not merge.compat:
        lossy = (dtype is not None and dtype != "float32") or kinds - {"float32", "float64"}
        if lossy:
            draft.note(f"`{merge.name}` is not rounded on the way (mergekit: written to disk in between)")
    elif dtype is not None or len(kinds) == 1:
        stored = dtype or kinds.pop()
        if stored not in ("float32", "float64"):
            wide = draft.step(f"{merge.name}_wide", "cast", result, where, dtype="float32")
            return draft.step(merge.name, "cast", wide, where, exact=True, dtype=stored)
    if result in draft.models or draft.rename(result, merge.name) == result:
        return draft.step(merge.name, "pass", result, where, exact=True)
    return merge.name


def _override(parts: list[Part], overrides: Mapping[str, Any]) -> None:
    """`--set KEY=VALUE` on the final document; `NAME.KEY=VALUE` on the one of that name."""
    named = {p.data["name"]: p for p in parts if isinstance(p.data, dict) and isinstance(p.data.get("name"), str)}
    final = next((p for p in parts if isinstance(p.data, dict) and "name" not in p.data), parts[-1])
    for key, value in overrides.items():
        head, dot, rest = key.partition(".")
        part = named.get(head) if dot else None
        if key == "compat":
            for each in parts:
                if isinstance(each.data, dict):
                    each.data["compat"] = value
        elif part is not None:
            part.override({rest: value})
        else:
            final.override({key: value})


def _ordered(merges: list[Merge]) -> tuple[list[Merge], Merge]:
    """Documents, each after those it refers to, and the one that is the output. Raises Refused."""
    named: dict[str, Merge] = {}
    final: Merge | None = None
    for merge in merges:
        if merge.name is None:
            if final is not None:
                raise Refused(
                    f"{merge.place()}: two documents have no `name`; only the output has none", hint="name the others"
                )
            final = merge
        elif merge.name in named:
            raise Refused(f"{merge.place('name')}: two documents are called `{merge.name}`")
        else:
            named[merge.name] = merge
    uses = {id(m): [named[r.path] for r in _references(m) if r.path in named] for m in merges}
    if final is None:
        ends = [m for m in merges if all(m not in uses[id(other)] for other in merges)]
        if len(ends) != 1:
            raise Refused(
                f"{merges[-1].place()}: which document is the output? every one has a name",
                hint="leave out the name of the one to write",
            )
        final = ends[0]
    order: list[Merge] = []
    _visit(final, uses, order, [])
    for merge in merges:
        if merge not in order:
            raise Refused(
                f"{merge.place('name')}: `{merge.name}` is not used by the output",
                hint=did_you_mean(merge.name or "", [r.path for m in merges for r in _references(m)]) or "remove the document",
            )
    return order, final


def _visit(merge: Merge, uses: Mapping[int, list[Merge]], order: list[Merge], above: list[Merge]) -> None:
    if merge in above:
        raise Refused(f"{merge.place('name')}: `{merge.name}` is made from itself")
    if merge in order:
        return
    for other in uses[id(merge)]:
        _visit(other, uses, order, [*above, merge])
    order.append(merge)


def _references(merge: Merge) -> list[Reference]:
    found = [s.model for m in merge.modules for sl in m.slices for s in sl.sources]
    return [*found, *([merge.base] if merge.base is not None else [])]


def _models(merge: Merge) -> Iterator[tuple[Reference, str]]:
    """Every model that a document merges, with its place."""
    for module in merge.modules:
        for slice_ in module.slices:
            for source in slice_.sources:
                yield source.model, merge.place(*source.path, "model")
        if module.whole and merge.base is not None:
            yield merge.base, merge.place("base_model")
