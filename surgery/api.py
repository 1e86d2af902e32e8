"""The Python interface: lazy checkpoints that can be computed with, edited, planned, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from surgery.checkpoint.structure import Tower
from surgery.errors import Refused, did_you_mean
from surgery.graph import edit
from surgery.graph.expr import Expr
from surgery.graph.forms import Form
from surgery.graph.literal import literal
from surgery.graph.node import Node
from surgery.graph.stitch import make
from surgery.inputs import open_node
from surgery.ops.declare import Op


def open(
    source: str | os.PathLike[str], *, name: str | None = None, base: str | os.PathLike[str] | Checkpoint | None = None
) -> Checkpoint:
    """Open a checkpoint lazily: a file, a directory or a hub id (`org/name@revision`). Only headers are read.

    name: what plans and messages call it; default the last part of the path. base: what a delta package is applied to; without
    one, a lossy package is a delta. Raises Refused.
    """
    if base is None or isinstance(base, Checkpoint):
        below = None if base is None else base.node
    else:
        below = open_node(os.fspath(base))
    return Checkpoint(open_node(os.fspath(source), label=name, base=below))


def load(recipe: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint that a recipe's output is made from, lazily. overrides: dotted key -> value. Raises Refused."""
    from surgery.recipe.native import read_recipe

    return Checkpoint(read_recipe(recipe, overrides or {}).node)


def run(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    engine: str = "local",
    address: str | None = None,
    device: str = "cpu",
    stream: bool = False,
    **options: Any,
) -> Any:
    """Carry out a recipe file, as `surgery run` does; returns a report of what was done.

    overrides: dotted key -> value. engine: "local", or "ray": the cluster at `address` ("host:port"; "local": one of this
    machine alone, for this run; default RAY_ADDRESS or the cluster that this machine belongs to). device: as in
    `Checkpoint.save`. stream: read hub models by byte ranges. options: of `surgery.engine.run.run`, such as memory, threads,
    resume. Raises Refused or Failed.
    """
    from surgery.engine.plan import make_plan
    from surgery.engine.run import run as carry_out
    from surgery.recipe.native import read_recipe
    from surgery.remote.mode import is_streaming, streaming

    with streaming(stream):
        read = read_recipe(recipe, overrides or {})
        plan = make_plan(read.node, read.settings)
    crew = _crew(recipe, overrides or {}, engine, address, device, stream or is_streaming())
    return carry_out(plan, out, hire=crew, **options)


def _crew(
    recipe: str | os.PathLike[str], overrides: Mapping[str, Any], engine: str, address: str | None, device: str, streams: bool
) -> Any:
    """Who carries out a recipe."""
    if engine not in ("local", "ray"):
        raise Refused(f"engine: `{engine}` is none", hint="local or ray")
    if engine == "local":
        if address is not None:
            raise Refused("address names a cluster", hint='add engine="ray"')
        return _on(device)
    from surgery.cluster.crew import hire

    if device != "cpu":
        raise Refused("device is of the threads of this process; on a cluster there are none", hint="leave one out")
    return hire(os.fspath(recipe), overrides, streams=streams, address=address)


def _on(device: str) -> Any:
    """The crew of a device, which warns of what does not run there although it was meant to."""
    import warnings

    from surgery.device.crew import hire

    return hire(device, lambda text: warnings.warn(text, stacklevel=4))


def align(
    checkpoints: Sequence[Checkpoint],
    tokenizer: str | Mapping[str, Any] = "union",
    *,
    base: str | None = None,
    chat_template: str | None = None,
    pad_to_multiple_of: int | None = None,
) -> list[Checkpoint]:
    """The same models, lazily, with the vocabulary rows of all of them in the places that one tokenizer gives them.

    tokenizer: "union", "base", the name of a checkpoint (as in `open(..., name=)`), or
    `{"source": …, "tokens": {token: {"source": …, "force": …}}, "pad_to_multiple_of": …}` as in recipes. base: the name of the
    checkpoint that "base" means; default the first. What is made of them carries the tokenizer along when it is saved.
    Raises Refused.
    """
    from surgery.vocabulary import Policy
    from surgery.vocabulary import align as aligned

    names = [c.node.label or f"input {i + 1}" for i, c in enumerate(checkpoints)]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"two checkpoints are called `{name}`", hint="open(..., name=...) tells them apart")
    models = {name: c.node for name, c in zip(names, checkpoints, strict=True)}
    policy = Policy.read(
        tokenizer, names, base=base, chat_template=chat_template, pad_to_multiple_of=pad_to_multiple_of
    )
    return [Checkpoint(node) for node in aligned(models, policy, keep=True).nodes.values()]


class LazyTensor:
    """One tensor of a checkpoint, not read or computed yet."""

    def __init__(self, node: Node, name: str, expr: Expr) -> None:
        self._node, self.name, self._expr = node, name, expr

    @property
    def shape(self) -> tuple[int, ...]:
        return self._expr.shape

    @property
    def dtype(self) -> str:
        """Storage type, as torch calls it: `bfloat16`."""
        return self._expr.dtype.torch

    def compute(self) -> Any:
        """Read just what this tensor needs and return it as a torch tensor of `dtype`."""
        from surgery.engine.compute import compute

        return compute(self._expr)

    def __repr__(self) -> str:
        return f"<LazyTensor {self.name} {self.dtype} {list(self.shape)}>"


class Checkpoint(Mapping[str, LazyTensor]):
    """A read-only map from tensor names to lazy tensors. Every method gives a new lazy checkpoint; nothing is read."""

    def __init__(self, node: Node) -> None:
        self.node = node

    # -- looking -------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return LazyTensor(self.node, name, self.node.tensors[name])
        except KeyError:
            hint = did_you_mean(name, self.node.tensors)
            raise KeyError(f"no tensor `{name}`" + (f"; {hint}" if hint else "")) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.node.tensors)

    def __len__(self) -> int:
        return len(self.node.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self.node.token == other.node.token

    def __hash__(self) -> int:
        return hash(self.node.token)

    @property
    def space(self) -> str:
        """"weights" or "delta"."""
        return self.node.space

    @property
    def config(self) -> dict[str, Any] | None:
        """The config.json that goes with these tensors."""
        return self.node.config

    def __repr__(self) -> str:
        return f"<Checkpoint {self.node.verb} {self.node.text} ({self.space})>"

    # -- editing -------------------------------------------------------------------------------------------------------

    def select(self, *globs: str) -> Checkpoint:
        """Only the tensors whose names match any glob (`model.layers.*.mlp.*`). Raises Refused for a glob without a match."""
        return Checkpoint(edit.SelectNode(self.node, globs))

    def drop(self, *globs: str) -> Checkpoint:
        """All but the tensors whose names match any glob."""
        return Checkpoint(edit.SelectNode(self.node, globs, drop=True))

    def rename(self, names: Mapping[str, str] | Callable[[str], str]) -> Checkpoint:
        """New names: a map old -> new, or a function of the old name."""
        return Checkpoint(edit.RenameNode(self.node, names))

    def cast(self, dtype: Any, *globs: str) -> Checkpoint:
        """Matching float tensors (default all) rounded to `dtype` (`bfloat16`, torch.bfloat16)."""
        return Checkpoint(edit.CastNode(self.node, str(dtype), globs or ("*",)))

    def replace(self, new: Mapping[str, Any]) -> Checkpoint:
        """Some tensors replaced or added: name -> LazyTensor, or anything torch.as_tensor takes."""
        exprs: dict[str, Expr] = {}
        others: dict[int, Node] = {}
        for name, value in new.items():
            if isinstance(value, LazyTensor):
                exprs[name] = value._expr
                others[id(value._node)] = value._node
            else:
                exprs[name] = literal(value, self.node)
        return Checkpoint(edit.ReplaceNode(self.node, exprs, list(others.values())))

    def map(self, function: Callable[..., Any], *globs: str) -> Checkpoint:
        """`function(tensor)` or `function(name, tensor)` applied to every matching tensor (default all) when it is computed.

        It gets a whole torch tensor in its stored type and must return one of the same shape.
        """
        return Checkpoint(edit.MapNode(self.node, function, globs or ("*",)))

    @property
    def layers(self) -> Layers:
        """The blocks of the model's tower: `ckpt.layers[8:16]`, `ckpt.layers[[0, 1, 1, 2]]`, `ckpt.layers("vision_model")`."""
        return Layers(self.node, None)

    # -- computing -----------------------------------------------------------------------------------------------------

    def __surgery_op__(self, op: Op, inputs: Sequence[Any], params: Mapping[str, Any]) -> Checkpoint:
        nodes = []
        for i, value in enumerate(inputs):
            if not isinstance(value, Checkpoint):
                raise Refused(f"{op.name}: input {i + 1} is a {type(value).__name__}, expected a checkpoint")
            nodes.append(value.node)
        params = dict(params)
        missing = params.pop("missing", "error")
        return Checkpoint(make(op, nodes, params, missing=missing))

    def __surgery_form__(self, form: Form, inputs: Sequence[Any], keys: Mapping[str, Any]) -> Checkpoint:
        for i, value in enumerate(inputs):
            if not isinstance(value, Checkpoint):
                raise Refused(f"{form.name}: input {i + 1} is a {type(value).__name__}, expected a checkpoint")
        return Checkpoint(form.node([c.node for c in inputs], keys, label=None, where={}))

    def __sub__(self, other: Checkpoint) -> Checkpoint:
        """weights - weights is a delta; anything - delta stays what it is."""
        ops = _ops()
        if not isinstance(other, Checkpoint):
            return NotImplemented
        if other.space == "delta":
            return self.__surgery_op__(ops["add"], (self, other), {"weight": -1.0})
        return self.__surgery_op__(ops["diff"], (self, other), {})

    def __add__(self, other: Checkpoint) -> Checkpoint:
        """weights + delta is weights; delta + delta is a delta."""
        if not isinstance(other, Checkpoint):
            return NotImplemented
        if self.space == "delta" and other.space == "weights":
            return other + self
        if other.space == "weights":
            raise Refused("weights + weights is no model", hint="surgery.ops.average(a, b), or a + (b - base)")
        return self.__surgery_op__(_ops()["add"], (self, other), {})

    def __mul__(self, factor: float) -> Checkpoint:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self.__surgery_op__(_ops()["scale"], (self,), {"by": float(factor)})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Checkpoint:
        return self * (1.0 / divisor)

    def __neg__(self) -> Checkpoint:
        return self * -1.0

    # -- doing ---------------------------------------------------------------------------------------------------------

    def plan(self, **settings: Any) -> Any:
        """What saving this would read, compute and write.

        settings: dtype, shard_size, tokenizer (the name of an input, whose tokenizer goes along), chat_template, integers,
        precision. Inputs whose tokens differ are aligned first, by `surgery.align`.
        """
        from surgery.checkpoint.layout import parse_size
        from surgery.engine.plan import make_plan
        from surgery.engine.settings import Settings
        from surgery.vocabulary.find import settle

        settle(self.node, settings)
        if "shard_size" in settings:
            settings["shard_size"] = parse_size(settings["shard_size"])
        if settings.get("dtype") is not None:
            settings["dtype"] = str(settings["dtype"])
        return make_plan(self.node, Settings(**settings))

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        memory: str | int | None = None,
        threads: int | None = None,
        allow_nonfinite: bool = False,
        durable: bool = False,
        device: str = "cpu",
        **settings: Any,
    ) -> Any:
        """Stream this to a new checkpoint directory; see `plan` for settings and `surgery.engine.run.run` for the rest.

        device: where weighted sums and matrix operators run: "cpu", "cuda", "cuda:1", or "auto", which takes the
        processor where there is no other. What cannot run there although it was meant to is a warning.
        """
        from surgery.engine.run import run

        return run(
            self.plan(**settings),
            out,
            resume=resume,
            overwrite=overwrite,
            memory=memory,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            durable=durable,
            hire=_on(device),
        )

    def to_transformers(self, **options: Any) -> Any:
        """A live transformers model with these weights. options go to `from_pretrained`. Remote code is never run."""
        from surgery.live import to_transformers

        return to_transformers(self, **options)


class Layers:
    """Indexable view of one tower's blocks; gives checkpoints with the chosen blocks, renumbered, and a config to match."""

    def __init__(self, node: Node, prefix: str | None) -> None:
        self._node, self._prefix = node, prefix

    def __call__(self, prefix: str) -> Layers:
        """The tower whose block names begin with `prefix`."""
        return Layers(self._node, prefix)

    def __len__(self) -> int:
        return self._tower().depth

    def __getitem__(self, keep: int | slice | Sequence[int]) -> Checkpoint:
        tower = self._tower()
        if isinstance(keep, slice):
            chosen = list(range(tower.depth))[keep]
        else:
            wanted = [keep] if isinstance(keep, int) else list(keep)
            chosen = [i + tower.depth if i < 0 else i for i in wanted]
        if not chosen or any(not 0 <= i < tower.depth for i in chosen):
            raise Refused(f"layers {keep} of `{tower.prefix}`: it has blocks 0 to {tower.depth - 1}")
        return Checkpoint(edit.LayersNode(self._node, tower, chosen))

    def _tower(self) -> Tower:
        towers = self._node.structure.towers
        if self._prefix is not None:
            towers = tuple(t for t in towers if t.prefix.startswith(self._prefix))
        if len(towers) != 1:
            names = ", ".join(f"{t.prefix} ({t.depth} blocks)" for t in self._node.structure.towers) or "none"
            raise Refused(f"which layers? towers here: {names}", hint='name one: checkpoint.layers("prefix")[...]')
        return towers[0]


def _ops() -> Mapping[str, Op]:
    from surgery.ops import registry

    return registry


__all__ = ["Checkpoint", "Layers", "LazyTensor", "align", "load", "open", "run"]
