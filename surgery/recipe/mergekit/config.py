"""What one document of the dialect says, checked for shape: every key is known and stands where it has an effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.recipe.document import Document
from surgery.recipe.mergekit.methods import METHODS, Method
from surgery.recipe.mergekit.references import Reference, reference

Path = tuple[Any, ...]

TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "compat",
)  # fmt: skip
WITHOUT_EFFECT = {
    "residual_weight": "mergekit never read it either",
    "input_model_parameters": "mergekit no longer reads it: put the parameters under each model or source",
}
FLOATS = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Scope:
    """A `parameters` map and where it stands. level: "input", "slice", "module" or "global"."""

    level: str
    said: Mapping[str, Any]
    path: Path


@dataclass(frozen=True)
class Source:
    """One input of a slice: blocks `range` of a model, None for all of them."""

    model: Reference
    range: tuple[int, int] | None
    scope: Scope
    path: Path


@dataclass(frozen=True)
class Slice:
    """Consecutive blocks of the output and what they are merged from."""

    sources: tuple[Source, ...]
    base: Reference | None
    scope: Scope
    path: Path


@dataclass(frozen=True)
class Module:
    """A part of the model (name None: all of it). whole: it was given as `models`, so the base joins by itself."""

    name: str | None
    slices: tuple[Slice, ...]
    whole: bool
    scope: Scope
    path: Path


@dataclass(frozen=True, eq=False)
class Merge:
    """One document."""

    document: Document
    method: Method
    modules: tuple[Module, ...]
    base: Reference | None
    scope: Scope
    dtype: str | None
    out_dtype: str | None
    name: str | None
    compat: bool

    def place(self, *path: Any) -> str:
        return self.document.place(*path)


def read_merge(document: Document) -> Merge:
    """Check one document. Raises Refused with file:line:col and what was meant."""
    data = document.data
    if not isinstance(data, dict):
        raise Refused(f"{document.place()}: expected a map with `merge_method`, found {data!r}")
    _known(document, (), data, TOP, "")
    if "merge_method" not in data:
        raise Refused(f"{document.place()}: this document has no `merge_method`", hint="every document of the file needs one")
    method = METHODS.get(data["merge_method"]) if isinstance(data["merge_method"], str) else None
    if method is None:
        raise Refused(
            f"{document.place('merge_method')}: there is no merge method `{data['merge_method']}`",
            hint=did_you_mean(str(data["merge_method"]), METHODS) or "known: " + ", ".join(METHODS),
        )
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        what = " and ".join(given) or "none"
        raise Refused(
            f"{document.place(*given[1:2])}: exactly one of `models`, `slices` and `modules` is needed, found {what}"
        )
    base = None if data.get("base_model") is None else reference(document, ("base_model",), data["base_model"])
    return Merge(
        document=document,
        method=method,
        modules=tuple(_modules(document, method, given[0])),
        base=base,
        scope=_scope(document, method, "global", data, ()),
        dtype=_dtype(document, "dtype"),
        out_dtype=_dtype(document, "out_dtype"),
        name=_name(document),
        compat=_compat(document),
    )


def _modules(document: Document, method: Method, kind: str) -> Iterable[Module]:
    data = document.data
    if kind != "modules":
        yield Module(None, *_content(document, method, kind, data[kind], ()), Scope("module", {}, ()), ())
        return
    if not isinstance(data["modules"], dict):
        raise Refused(f"{document.place('modules')}: `modules` must be a map of module name to models or slices")
    for name, said in data["modules"].items():
        path: Path = ("modules", name)
        if not isinstance(said, dict):
            raise Refused(f"{document.place(*path)}: expected `models` or `slices`, found {said!r}")
        _known(document, path, said, ("models", "slices", "parameters"), " of a module")
        inner = [key for key in ("models", "slices") if said.get(key)]
        if len(inner) != 1:
            raise Refused(f"{document.place(*path)}: module `{name}` needs either `models` or `slices`")
        slices, whole = _content(document, method, inner[0], said[inner[0]], path)
        yield Module(name, slices, whole, _scope(document, method, "module", said, path), path)


def _content(
    document: Document, method: Method, kind: str, said: Any, above: Path
) -> tuple[tuple[Slice, ...], bool]:
    """The slices of a module, and whether it was given as whole models."""
    path = (*above, kind)
    if not isinstance(said, list):
        raise Refused(f"{document.place(*path)}: `{kind}` must be a list, found {said!r}")
    if kind == "models":
        sources = tuple(_source(document, method, (*path, i), item, ranged=False) for i, item in enumerate(said))
        return (Slice(sources, None, Scope("slice", {}, ()), path),), True
    slices = []
    for i, item in enumerate(said):
        here = (*path, i)
        if not isinstance(item, dict):
            raise Refused(f"{document.place(*here)}: a slice is a map with `sources`, found {item!r}")
        _known(document, here, item, ("sources", "base_model", "parameters"), " of a slice")
        if not isinstance(item.get("sources"), list) or not item["sources"]:
            raise Refused(f"{document.place(*here, 'sources')}: a slice needs `sources`: a list of models with layer_range")
        found = tuple(
            _source(document, method, (*here, "sources", j), s, ranged=True) for j, s in enumerate(item["sources"])
        )
        base = None
        if item.get("base_model") is not None:
            base = reference(document, (*here, "base_model"), item["base_model"])
        slices.append(Slice(found, base, _scope(document, method, "slice", item, here), here))
    return tuple(slices), False


def _source(document: Document, method: Method, path: Path, said: Any, *, ranged: bool) -> Source:
    if not isinstance(said, dict):
        raise Refused(f"{document.place(*path)}: expected a map with `model`, found {said!r}", hint="write - model: PATH")
    if not ranged and "layer_range" in said:
        raise Refused(
            f"{document.place(*path, 'layer_range')}: `layer_range` has no effect under `models`",
            hint="write slices: - sources: - {model, layer_range}",
        )
    known = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
    _known(document, path, said, known, " of a source" if ranged else " of a model")
    if "model" not in said:
        raise Refused(f"{document.place(*path)}: `model` is missing here")
    blocks = None
    if ranged:
        blocks = said.get("layer_range")
        good = isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int for n in blocks)
        if not good or blocks is None:
            what = f"found {blocks!r}" if "layer_range" in said else "it is missing"
            raise Refused(f"{document.place(*path, 'layer_range')}: `layer_range` must be [first, beyond last]; {what}")
        if not 0 <= blocks[0] < blocks[1]:
            raise Refused(
                f"{document.place(*path, 'layer_range')}: layer_range {list(blocks)} holds no layer",
                hint="the first layer is 0, the second number is one beyond the last",
            )
    model = reference(document, (*path, "model"), said["model"])
    chosen = (blocks[0], blocks[1]) if blocks is not None else None
    return Source(model, chosen, _scope(document, method, "input", said, path), path)


def _scope(document: Document, method: Method, level: str, holder: Mapping[str, Any], above: Path) -> Scope:
    path = (*above, "parameters")
    said = holder.get("parameters")
    if said is None:
        return Scope(level, {}, path)
    if not isinstance(said, dict):
        raise Refused(f"{document.place(*path)}: `parameters` must be a map, found {said!r}")
    for key in said:
        parameter = method.parameters.get(key)
        place = document.place(*path, key)
        if parameter is None:
            hint = did_you_mean(key, method.parameters) if method.parameters else f"{method.name} has no parameters"
            raise Refused(f"{place}: {method.name} has no parameter `{key}`; mergekit ignores it", hint=hint)
        if level == "input" and parameter.scope == "shared":
            raise Refused(
                f"{place}: `{key}` belongs to the merge as a whole; under one model mergekit ignores it",
                hint="move it to `parameters` of the slice or of the recipe",
            )
    return Scope(level, said, path)


def _known(document: Document, path: Path, said: Mapping[str, Any], known: Iterable[str], of: str) -> None:
    names = list(known)
    for key in said:
        if key in names:
            continue
        place = document.place(*path, key)
        if key in WITHOUT_EFFECT:
            raise Refused(f"{place}: `{key}` has no effect: {WITHOUT_EFFECT[key]}", hint="remove it")
        raise Refused(f"{place}: unknown key `{key}`{of}; mergekit ignores it", hint=did_you_mean(key, names))


def _dtype(document: Document, key: str) -> str | None:
    said = document.data.get(key)
    if said is None:
        return None
    name = str(said).removeprefix("torch.")
    if name not in FLOATS:
        raise Refused(f"{document.place(key)}: `{key}` cannot be `{said}`", hint=did_you_mean(name, FLOATS))
    return name


def _name(document: Document) -> str | None:
    said = document.data.get("name")
    if said is None or (isinstance(said, str) and said.strip()):
        return said
    raise Refused(f"{document.place('name')}: `name` must be text, found {said!r}")


def _compat(document: Document) -> bool:
    said = document.data.get("compat")
    if said not in (None, "mergekit"):
        raise Refused(f"{document.place('compat')}: `compat` cannot be `{said}`", hint="the only value is mergekit")
    return said == "mergekit"
