"""One document as steps: models opened, blocks cut, every slice merged, slices stacked, modules put together."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.dtypes import BY_TORCH, promote
from surgery.checkpoint.structure import Structure, Tower, structure_of
from surgery.errors import Refused, did_you_mean
from surgery.graph.node import Node
from surgery.recipe.mergekit.config import Merge, Module, Scope, Slice, Source
from surgery.recipe.mergekit.draft import Draft
from surgery.recipe.mergekit.filters import exactly
from surgery.recipe.mergekit.job import Input, Job
from surgery.recipe.mergekit.lower import lower
from surgery.recipe.mergekit.modules import Inside, globs, module, module_names, tower_inside
from surgery.recipe.mergekit.references import Reference
from surgery.recipe.mergekit.values import Filters, Frame


@dataclass
class Lowering:
    """Lowers the documents of one file into one draft. named: step of every document that is done, by the document's name."""

    draft: Draft
    folder: Path
    named: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)

    def document(self, merge: Merge) -> str:
        """The step that is the document's result. Raises Refused with places."""
        filters = Filters()
        if merge.modules[0].name is None:
            result = self._module(merge, merge.modules[0], filters, lambda name: True)
        else:
            result = self._modules(merge, filters)
        filters.check()
        return result

    # -- models ----------------------------------------------------------------------------------------------------------

    def opened(self, merge: Merge, model: Reference, place: str) -> str:
        """The label of a model, or the step of an earlier document of that name."""
        if model.path in self.named:
            if model.revision or model.adapter:
                raise Refused(
                    f"{place}: `{model}`: `{model.path}` is made in this file; it has no revision and takes no adapter",
                    hint="put the adapter on a model that the document is made from",
                )
            return self.named[model.path]
        label = self.label(model, place)
        if merge.compat and merge.dtype is not None:
            return self._rounded(label, merge.dtype, place)
        computed = merge.method.name != "passthrough"
        if computed and merge.dtype is not None and _loses(self.draft.nodes[label], merge.dtype):
            self.draft.note(f"inputs are not rounded to {merge.dtype} first, only the result is (mergekit: both)")
        return label

    def label(self, model: Reference, place: str) -> str:
        """The label of a model that is opened here, if it was not before."""
        location = model.location(self.folder)
        if not any(os.path.isabs(path) for path in (model.path, model.adapter or "")):
            self.draft.relative.add(location)
        return self.draft.model(location, model.label, place)

    def _rounded(self, label: str, dtype: str, place: str) -> str:
        if not _loses(self.draft.nodes[label], dtype):
            return label
        where = {"": place}
        return self.draft.step(f"{label}_{dtype}", "cast", label, where, dtype=dtype)

    # -- modules ---------------------------------------------------------------------------------------------------------

    def _modules(self, merge: Merge, filters: Filters) -> str:
        """Every module from its own merge; what is in none of them from the base."""
        first = merge.base or merge.modules[0].slices[0].sources[0].model
        whole = self.opened(merge, first, merge.place("modules"))
        names = list(self.draft.nodes[whole].tensors)
        rules: dict[str, str] = {}
        taken: list[Inside] = []
        deeper: list[str] = []
        for part in merge.modules:
            assert part.name is not None
            inside = module(part.name, names)
            if inside is None:
                raise Refused(
                    f"{merge.place(*part.path)}: `{first}` has no module `{part.name}`",
                    hint=did_you_mean(part.name, module_names(names)),
                )
            step = self._module(merge, part, filters, inside)
            mine = list(self.draft.nodes[step].tensors)
            if _depths(self.draft.nodes[step]) != _depths(self.draft.nodes[whole]):
                deeper.append(step)
            taken.append(inside)
            rules |= {glob: step for glob in globs(mine, inside) if glob not in rules}
        if len(deeper) > 1:
            raise Refused(
                f"{merge.place('modules')}: two modules change their number of layers; one config cannot say both yet",
                hint="do it in two recipes, one module each",
            )
        rest = [n for n in names if not any(inside(n) for inside in taken)]
        if rest:
            rules["*"] = whole
            self.draft.note(f"{len(rest)} tensors of no listed module are taken from `{first}` (mergekit: left out)")
        of = sorted(dict.fromkeys(rules.values()), key=lambda step: step not in deeper)
        where = {"": merge.place("modules")}
        return self.draft.step("merged", "stitch", of, where, rules=rules) if len(of) > 1 else of[0]

    def _module(self, merge: Merge, part: Module, filters: Filters, inside: Inside) -> str:
        slices = [self._with_base(merge, s) for s in part.slices] if part.whole else list(part.slices)
        made: list[list[tuple[Source, str]]] = []
        for slice_ in slices:
            made.append([(s, self.opened(merge, s.model, merge.place(*s.path, "model"))) for s in slice_.sources])
        tower = None
        if part.whole:
            self._check_whole(merge, made[0], inside)
            depths = [0]
        else:
            tower = self._tower(merge, part, made[0][0][1], inside)
            depths = [self._check_ranges(merge, s) for s in slices]
        total, steps = sum(depths), []
        for k, (slice_, sources) in enumerate(zip(slices, made, strict=True)):
            start = sum(depths[:k])
            suffix = f"_{k + 1}" if len(slices) > 1 else ""
            inputs = [self._input(merge, source, name, tower, start) for source, name in sources]
            nodes = [self.draft.nodes[i.name] for i in inputs]
            structure, cut = _structure(nodes, tower, inside)
            frame = Frame(
                names=tuple({n: None for node in nodes for n in node.tensors}),
                structure=structure,
                tower=cut,
                start=start,
                total=total or (cut.depth if cut else 0),
                first=k == 0,
                last=k == len(slices) - 1,
                compat=merge.compat,
                inside=inside,
            )
            base, others = self._base(merge, part, slice_, inputs)
            place = merge.place("merge_method") if part.whole else merge.place(*slice_.path)
            scopes = [slice_.scope, part.scope, merge.scope]
            job = Job(self.draft, merge, base, others, scopes, frame, filters, suffix, place, self.seeds)
            steps.append(_merged(job))
        if len(steps) == 1:
            return steps[0]
        where = {"": merge.place(*part.path, "slices"), "of": merge.place(*part.path, "slices")}
        keys = self._tower_key(steps[0], tower)
        return self.draft.step("stacked", "stack", steps, where, **keys)

    # -- slices ----------------------------------------------------------------------------------------------------------

    def _with_base(self, merge: Merge, slice_: Slice) -> Slice:
        """Whole models: the base is an input even where it is not listed."""
        if merge.base is None or any(s.model == merge.base for s in slice_.sources):
            return slice_
        base = Source(merge.base, None, Scope("input", {}, ("base_model",)), ("base_model",))
        return replace(slice_, sources=(*slice_.sources, base))

    def _base(self, merge: Merge, part: Module, slice_: Slice, inputs: list[Input]) -> tuple[Input | None, list[Input]]:
        """The base among the inputs and the others, checked against what the method takes."""
        method, wanted = merge.method, slice_.base or merge.base
        place = merge.place(*slice_.path)
        at = next((i for i, item in enumerate(inputs) if item.model == wanted), None)
        if method.base == "required" and wanted is None:
            raise Refused(f"{merge.place('merge_method')}: {method.name} needs a `base_model`", hint="base_model: PATH")
        if method.base != "ignored" and wanted is not None and at is None:
            raise Refused(
                f"{place}: the base model `{wanted}` is not among the sources of this slice",
                hint=f"add - {{model: {wanted}, layer_range: [a, b]}} with the layers that the others are compared with",
            )
        base = None if at is None else inputs[at]
        others = [item for i, item in enumerate(inputs) if i != at]
        if not method.at_least <= len(inputs) <= method.at_most:
            joined = merge.base is not None and part.whole and inputs[-1].scope.path == ("base_model",)
            raise Refused(
                f"{place}: {method.name} takes {_count(method.at_least, method.at_most)}, got {len(inputs)}"
                + (" with the base" if base is not None and method.base != "ignored" else ""),
                hint="`base_model` counts as an input where it is not listed" if joined else None,
            )
        if not method.others[0] <= len(others) <= method.others[1]:
            raise Refused(f"{place}: {method.name} takes {_count(*method.others)} beside the base, got {len(others)}")
        if base is not None and method.base == "required":
            for key in base.scope.said:
                if method.parameters[key].scope == "others":
                    self.draft.notes.setdefault(f"`{key}` of the base model has no effect (in mergekit too)")
        return base, others

    def _check_whole(self, merge: Merge, sources: list[tuple[Source, str]], inside: Inside) -> None:
        """Whole models must be equally deep, and each is listed once."""
        first_source, first = sources[0]
        depths = {t.prefix: t.depth for t in tower_inside(self.draft.nodes[first].structure, inside)}
        seen: set[Reference] = set()
        for source, name in sources:
            place = merge.place(*source.path)
            if source.model in seen:
                raise Refused(f"{place}: `{source.model}` is listed twice", hint="give it once, with a larger weight")
            seen.add(source.model)
            for tower in tower_inside(self.draft.nodes[name].structure, inside):
                other = depths.get(tower.prefix, tower.depth)
                if other != tower.depth:
                    raise Refused(
                        f"{place}: `{source.model}` has {tower.depth} layers, `{first_source.model}` has {other}",
                        hint="choose layers with slices: - sources: - {model, layer_range}",
                    )

    def _check_ranges(self, merge: Merge, slice_: Slice) -> int:
        """Layers of a slice; all of its sources have as many."""
        first = slice_.sources[0]
        assert first.range is not None
        depth = first.range[1] - first.range[0]
        for source in slice_.sources[1:]:
            assert source.range is not None
            if source.range[1] - source.range[0] != depth:
                raise Refused(
                    f"{merge.place(*source.path, 'layer_range')}: layer_range {list(source.range)} holds "
                    f"{source.range[1] - source.range[0]} layers, {list(first.range)} of `{first.model}` {depth}",
                    hint="all sources of a slice must have the same number of layers",
                )
        return depth

    def _tower(self, merge: Merge, part: Module, name: str, inside: Inside) -> Tower:
        towers = tower_inside(self.draft.nodes[name].structure, inside)
        if part.name is not None and towers:
            return max(towers, key=lambda t: t.depth)
        if len(towers) != 1:
            found = ", ".join(f"{t.prefix} ({t.depth} layers)" for t in towers) or "none"
            raise Refused(
                f"{merge.place(*part.path, 'slices')}: which layers? `{name}` has several stacks: {found}"
                if towers
                else f"{merge.place(*part.path, 'slices')}: no layers were found in `{name}`",
                hint="name them: modules: {text_decoder: {slices: …}}" if towers else None,
            )
        return towers[0]

    def _input(self, merge: Merge, source: Source, name: str, tower: Tower | None, start: int) -> Input:
        place = merge.place(*source.path)
        shift = 0
        if source.range is not None:
            assert tower is not None
            node = self.draft.nodes[name]
            own = next((t for t in node.structure.towers if t.prefix == tower.prefix), None)
            if own is None:
                raise Refused(f"{place}: `{source.model}` has no layers `{tower.prefix}.*`")
            low, high = source.range
            if high > own.depth:
                raise Refused(
                    f"{merge.place(*source.path, 'layer_range')}: layer_range {[low, high]}: "
                    f"`{source.model}` has {own.depth} layers, 0 to {own.depth - 1}"
                )
            shift = low
            if (low, high) != (0, own.depth):
                where = {"": place, "keep": merge.place(*source.path, "layer_range")}
                keys: dict[str, Any] = {"keep": [f"{low}:{high}"], **self._tower_key(name, tower)}
                name = self.draft.step(f"{name}_{low}_{high}", "layers", name, where, **keys)
        return Input(name, source.model, source.scope, shift, place)

    def _tower_key(self, name: str, tower: Tower | None) -> dict[str, Any]:
        several = tower is not None and len(self.draft.nodes[name].structure.towers) > 1
        return {"tower": tower.prefix} if several and tower is not None else {}


def _structure(nodes: list[Node], tower: Tower | None, inside: Inside) -> tuple[Structure, Tower | None]:
    """Of all tensors of a slice, and the tower that its layers are of (None if there are several to choose from)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node in nodes:
        for name, expr in node.tensors.items():
            shapes.setdefault(name, expr.shape)
    structure = structure_of(shapes)
    if tower is not None:
        return structure, next((t for t in structure.towers if t.prefix == tower.prefix), None)
    towers = tower_inside(structure, inside)
    return structure, towers[0] if len(towers) == 1 else None


def _merged(job: Job) -> str:
    """The slice's step. Switches that differ between tensors: one step per setting, stitched together."""
    switches = [p for p in job.method.parameters.values() if p.kind != "number"]
    settings: dict[str, tuple[Any, ...]] = {}
    for parameter in switches:
        for name, value in job.resolver.plain(job.settings(parameter.name), job.frame.start).items():
            settings[name] = (*settings.get(name, ()), value)
    kinds = list(dict.fromkeys(v for n, v in settings.items() if job.frame.reaches(n)))
    if len(kinds) < 2:
        job.fixed = dict(zip((p.name for p in switches), kinds[0], strict=True)) if kinds else {}
        return lower(job)
    rules: dict[str, str] = {}
    for kind in kinds[1:] + kinds[:1]:
        part = replace(job, fixed=dict(zip((p.name for p in switches), kind, strict=True)))
        step = lower(part)
        if kind == kinds[0]:
            rules["*"] = step
        else:
            rules |= {exactly(n): step for n, v in settings.items() if v == kind}
    return job.draft.step("merged" + job.suffix, "stitch", list(dict.fromkeys(rules.values())), {"": job.place}, rules=rules)


def _loses(node: Node, dtype: str) -> bool:
    """Whether rounding to a type changes values of a node."""
    wanted = BY_TORCH[dtype]
    kinds = {e.dtype for e in node.tensors.values() if e.dtype.is_float}
    return any(promote(k, wanted) != wanted for k in kinds)


def _depths(node: Node) -> dict[str, int]:
    return {t.prefix: t.depth for t in node.structure.towers}


def _count(low: int, high: float) -> str:
    noun = "model" if low == 1 and high == 1 else "models"
    return f"{low} {noun}" if low == high else f"{low} {noun} or more"
