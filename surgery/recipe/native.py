"""The native recipe language: `models`, `steps` that look back, `output`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surgery import steps
from surgery.checkpoint.layout import parse_size
from surgery.engine.settings import DEFAULT_SHARD, Settings
from surgery.errors import Refused, did_you_mean
from surgery.graph.forms import forms
from surgery.graph.node import Node
from surgery.graph.stitch import make
from surgery.inputs import open_node
from surgery.ops import registry
from surgery.recipe.document import Document, may_be_dialect
from surgery.vocabulary import Policy, align


@dataclass(frozen=True)
class Recipe:
    """A recipe read: what to make, and the settings of its output."""

    node: Node
    settings: Settings


def read_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe file into a graph; sources' headers are opened. Raises Refused with file:line:col."""
    if may_be_dialect(Path(path)):
        from surgery.recipe.mergekit.read import read_dialect

        dialect = read_dialect(path, overrides)
        if dialect is not None:
            return Recipe(dialect.node, dialect.settings)
    document = Document(Path(path))
    if document.data is not None:
        document.override(overrides)
    _check_shape(document)
    known: dict[str, Node] = {}
    for name in document.data["models"]:
        _model(document, name, known, [])
    policy = _policy(document, known)
    aligned = align(known, policy)
    known |= aligned.nodes
    said = document.data.get("steps") or {}
    for name in said:
        if name in known:
            raise Refused(f"{document.place('steps', name)}: `{name}` is also a model", hint="give the step another name")
        known[name] = _step(document, name, known, list(said))
    output = document.data["output"]
    node = _named(document, ("output", "from"), output["from"], known, [])
    _check_used(document, node, known, policy)
    where = {key: document.place("output", key) for key in output}
    settings = Settings(
        dtype=output.get("dtype"),
        shard_size=_size(document, output),
        integers=output.get("integers"),
        precision=output.get("precision", "float32"),
        recipe=_with_overrides(document.text, overrides),
        where=where,
        **aligned.settings,
    )
    return Recipe(node, settings)


def _policy(document: Document, models: Mapping[str, Node]) -> Policy:
    """What `output` says about tokens: `tokenizer`, `pad_to_multiple_of` and `chat_template`."""
    output = document.data["output"]
    keys = {"": ("output",), "source": ("output", "tokenizer"), "tokens": ("output", "tokenizer", "tokens")}
    keys |= {key: ("output", key) for key in ("chat_template", "pad_to_multiple_of")}
    return Policy.read(
        output.get("tokenizer"),
        models,
        base=_leading(document, models),
        chat_template=output.get("chat_template"),
        pad_to_multiple_of=output.get("pad_to_multiple_of"),
        folder=document.path.parent,
        where={key: document.place(*path) for key, path in keys.items()},
    )


def _leading(document: Document, models: Mapping[str, Node]) -> str | None:
    """The model whose config goes along: the first input of the output's first input, and so on."""
    name = str(document.data["output"]["from"])
    said = document.data.get("steps") or {}
    for _ in range(len(said) + 1):
        if name in models:
            return name if models[name].space == "weights" else None
        of = (said.get(name) or {}).get("of")
        name = str(of[0] if isinstance(of, list) and of else of)
    return None


def _with_overrides(text: str, overrides: Mapping[str, Any]) -> str:
    changed = "".join(f"# --set {key}={value}\n" for key, value in overrides.items())
    return changed + text


def _size(document: Document, output: Mapping[str, Any]) -> int:
    try:
        return parse_size(output.get("shard_size", DEFAULT_SHARD))
    except Refused as problem:
        raise Refused(f"{document.place('output', 'shard_size')}: {problem.message}", hint=problem.hint) from None


def _model(document: Document, name: str, known: dict[str, Node], above: list[str]) -> Node:
    """Open the model `name`, and first the one that it is a delta package of. above: packages that wait for it."""
    if name in known:
        return known[name]
    said = document.data["models"][name]
    source = said if isinstance(said, str) else said["source"]
    if isinstance(said, dict) and "revision" in said:
        source = f"{source}@{said['revision']}"
    base = None
    if isinstance(said, dict) and "base" in said:
        if said["base"] in (name, *above):
            raise Refused(f"{document.place('models', name, 'base')}: `{said['base']}` would be its own base")
        if said["base"] in document.data["models"]:
            base = _model(document, said["base"], known, [*above, name])
        else:
            base = open_node(_beside(document, said["base"]), where={"": document.place("models", name, "base")})
    where = {"": document.place("models", name)}
    known[name] = open_node(_beside(document, source), base=base, label=name, where=where)
    return known[name]


def _beside(document: Document, source: str) -> str:
    """Paths are relative to the recipe."""
    if os.path.isabs(source):
        return source
    beside = document.path.parent / source
    file = document.path.parent / source.partition("#")[0]  # a view of a delta package, which may lie in shards
    there = beside.exists() or file.is_file() or file.with_name(f"{file.name}.index.json").is_file()
    return str(beside) if there else source


def _step(document: Document, name: str, known: Mapping[str, Node], order: list[str]) -> Node:
    said = dict(document.data["steps"][name])
    place = partial(document.place, "steps", name)
    kind = said.pop("op")
    op, form = registry.get(kind), steps.get(kind)
    if op is None and form is None:
        raise Refused(
            f"{place('op')}: there is no operator `{kind}`",
            hint=did_you_mean(kind, [*registry, *forms]) or "`surgery ops` lists them",
        )
    of = said.pop("of")
    names = [of] if isinstance(of, str) else of
    later = order[order.index(name) :]
    inputs = [
        _named(document, ("steps", name, "of", *([i] if isinstance(of, list) else [])), n, known, later)
        for i, n in enumerate(names)
    ]
    where = {"": place(), "of": place("of"), "missing": place("missing"), **{k: place(k) for k in said}}
    if op is None:
        assert form is not None
        return form.node(inputs, said, label=name, where=where)
    missing = said.pop("missing", "error")
    return make(op, inputs, said, missing=missing, label=name, where=where)


def _named(document: Document, path: tuple[Any, ...], name: str, known: Mapping[str, Node], later: list[str]) -> Node:
    if name in known:
        return known[name]
    if name in later:
        problem = "a step cannot use itself" if name == later[0] else f"step `{name}` comes later; steps may only look back"
        raise Refused(f"{document.place(*path)}: {problem}")
    raise Refused(f"{document.place(*path)}: there is no model or step `{name}`", hint=did_you_mean(name, known))


def _check_used(document: Document, node: Node, known: Mapping[str, Node], policy: Policy) -> None:
    """A step or model that does not reach the output is a mistake, unless it gives tokens or a chat template."""
    named = {policy.source, policy.chat_template, *(rule.model for rule in policy.tokens.values())}
    used: set[int] = {id(known[name]) for name in named if name is not None and name in document.data["models"]}
    stack = [node]
    while stack:
        here = stack.pop()
        used.add(id(here))
        stack.extend(here.inputs)
    for name, other in sorted(known.items(), key=lambda item: item[0] in document.data["models"]):
        if id(other) not in used:
            kind = "models" if name in document.data["models"] else "steps"
            raise Refused(
                f"{document.place(kind, name)}: `{name}` is not used by the output",
                hint="remove it, or use it in a step that leads to output.from",
            )


def _check_shape(document: Document) -> None:
    """Sections, their types and keys. What concerns operators they check themselves, with more to say."""
    import jsonschema

    from surgery.recipe.schema import recipe_schema, shape_only

    if not isinstance(document.data, dict):
        raise Refused(f"{document.path}: not a recipe (expected models, steps and output)")
    validator = jsonschema.Draft202012Validator(shape_only(recipe_schema()))
    problems = sorted(validator.iter_errors(document.data), key=lambda e: (e.validator != "additionalProperties", len(e.path)))
    if problems:
        raise _explained(document, problems[0])


def _explained(document: Document, problem: Any) -> Refused:
    path = list(problem.absolute_path)
    what = ".".join(map(str, path)) or "the recipe"
    if problem.validator == "additionalProperties" and problem.schema.get("properties"):
        known = list(problem.schema["properties"])
        key = next(k for k in problem.instance if k not in known)
        return Refused(f"{document.place(*path, key)}: unknown key `{key}` in {what}", hint=did_you_mean(key, known))
    if problem.validator == "required":
        lacking = next(k for k in problem.validator_value if k not in problem.instance)
        return Refused(f"{document.place(*path)}: {what} needs `{lacking}`")
    if problem.validator == "enum":
        hint = did_you_mean(str(problem.instance), map(str, problem.validator_value))
        return Refused(f"{document.place(*path)}: {what} cannot be `{problem.instance}`", hint=hint)
    wanted = {"object": "a map", "string": "text", "array": "a list"}
    if problem.validator == "type":
        kind = problem.validator_value
        expected = " or ".join(wanted.get(k, k) for k in ([kind] if isinstance(kind, str) else kind))
        return Refused(f"{document.place(*path)}: {what} must be {expected}, found {problem.instance!r}")
    if problem.validator == "minProperties":
        return Refused(f"{document.place(*path)}: {what} is empty")
    if problem.validator == "anyOf" and path and path[-1] == "of":
        return Refused(f"{document.place(*path)}: `of` must be a name or a list of names, found {problem.instance!r}")
    return Refused(f"{document.place(*path)}: {what}: expected a path, a hub id, or {{source, revision}}")
