"""Smoothing as a node: scales per input channel, moved from what reads them into what makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import did_you_mean
from surgery.graph.expr import Expr
from surgery.graph.node import Node, sources_of
from surgery.reshape.feeds import FAMILIES, KEYS, Feed, heads, named
from surgery.reshape.rescaled import How, KeyScales, Rescaled, Scales
from surgery.statistics.node import StatisticsNode

_FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK = "{block}"


@dataclass
class Moved:
    """A scale of this model: which layer makes the channels, from which output on, and which layers read them."""

    feed: Feed
    source: str
    first: int
    readers: list[str]
    scales: Scales


class SmoothNode(Node):
    """The model as the same function, with scales of channels moved between layers so that both are easier to quantise."""

    verb = "SMOOTH"

    def __init__(self, model: Node, statistics: Node, label: str | None, where: Mapping[str, str], *, how: How,
                 only: Sequence[str], feeds: Mapping[str, Any]) -> None:  # fmt: skip
        super().__init__(label, where)
        self.inputs = (model, statistics)
        self.how, self.only, self.feeds, self._made = how, tuple(only), feeds, ""
        if model.space != "weights":
            raise self.refuse(f"smooth takes weights; `{model.label or 'the model'}` is {model.space}", key="of")
        if not isinstance(statistics, StatisticsNode) or statistics.kind != "inputs":
            found = statistics.kind if isinstance(statistics, StatisticsNode) else statistics.space
            raise self.refuse(
                f"smooth takes a model and the statistics of its layers' inputs; `{statistics.label or 'input 2'}` is {found}",
                hint="collect them: surgery statistics MODEL --kind inputs --data FILE -o DIR",
                key="of",
            )
        self.statistics = statistics
        problem = statistics.mismatch(s.source for s in sources_of(model))
        if problem:
            raise self.refuse(problem, hint="collect them again from this model", key="of")

    # -- which layers ----------------------------------------------------------------------------------------------------

    def _build(self) -> dict[str, Expr]:
        model = self.inputs[0]
        made, without = [], list[str]()
        for feed, source, readers in self._pairs():
            moved = self._moved(feed, source, readers)
            if moved is None:
                without.append(source)
            else:
                made.append(moved)
        if not made:
            raise self.refuse(
                f"{self.statistics.label} has no statistics of any layer that could be scaled", key="of",
                hint=did_you_mean(f"{without[0]}.weight", self.statistics.tensors) if without else None,
            )  # fmt: skip
        self._alone(made)
        self._made = f"({len(made)} scales{'' if self.feeds else ': ' + ', '.join(dict.fromkeys(m.feed.where for m in made))})"
        if without:
            self.notes = [f"{len(without)} layers feed others without statistics and stay as they are: `{without[0]}`, …"]
        return {name: self._rescaled(name, expr, made) for name, expr in model.tensors.items()}

    def _pairs(self) -> list[tuple[Feed, str, list[str]]]:
        """(feed, path of the source, paths of the readers), of all blocks."""
        model, config = self.inputs[0], self._said
        towers = model.structure.towers
        blocks = [b for tower in towers for b in tower.blocks]
        if self.feeds:
            found = []
            for feed in named(self.feeds):
                for text in (feed.source, *feed.readers):
                    if (BLOCK in text) != (BLOCK in feed.source):
                        raise self.refuse(f"`{text}` and `{feed.source}` must both name a {BLOCK}, or none", key="feeds")
                if BLOCK in feed.source and not blocks:
                    raise self.refuse(f"`feeds`: the model has no blocks that {BLOCK} could stand for", key="feeds")
                for block in blocks if BLOCK in feed.source else [""]:
                    found.append((feed, feed.source.replace(BLOCK, block), [r.replace(BLOCK, block) for r in feed.readers]))
            return found
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise self.refuse(
                f"which layers read which norm is not known of models of type {kind}; it is of {', '.join(FAMILIES)}",
                hint=f'name them: feeds: {{"{BLOCK}.norm": ["{BLOCK}.q_proj", "{BLOCK}.k_proj"]}}', key="of",
            )  # fmt: skip
        chosen = [f for f in FAMILIES[kind] if f.where in self.only and f.holds(config)]
        if not chosen:
            there = sorted({f.where for f in FAMILIES[kind] if f.holds(config)})
            raise self.refuse(
                f"in models of type {kind} no scale can be moved at {', '.join(self.only)}: there is {', '.join(there)} alone",
                key="at",
            )
        pairs = []
        for f in chosen:  # a vision tower beside the language model may have readers of that name, but not what feeds them
            those = [t for t in towers if any(f"{b}.{f.source}.weight" in model.tensors for b in t.blocks)] or towers
            pairs += [(f, f"{b}.{f.source}", [f"{b}.{r}" for r in f.readers]) for t in those for b in t.blocks
                      if f"{b}.{f.readers[0]}.weight" in model.tensors]  # fmt: skip
        return pairs

    @property
    def _said(self) -> Mapping[str, Any]:
        """The config; of a model of several parts that of the language model."""
        config = self.inputs[0].config or {}
        inner = config.get("text_config")
        return inner if isinstance(inner, Mapping) and config.get("model_type") not in FAMILIES else config

    # -- one scale -------------------------------------------------------------------------------------------------------

    def _moved(self, feed: Feed, source: str, readers: list[str]) -> Moved | None:
        """None where no statistics tell what the readers see."""
        self._free(source, readers)
        made_by = self._weight(source, "makes what they read")
        weights = [self._weight(r, "reads it") for r in readers]
        if feed.where == KEYS:
            return self._keys(feed, source, made_by, readers[0], weights[0])
        name = next((f"{r}.weight" for r in readers if f"{r}.weight" in self.statistics.tensors), None)
        if name is None:
            return None
        seen = self.statistics.tensors[name]
        transposed = len(seen.shape) == 3
        if len(seen.shape) not in (2, 3) or seen.shape[0] < 3 or (transposed and seen.shape[2] != 1):
            raise self.refuse(f"{self.statistics.label}: `{name}` is {list(seen.shape)}, "
                              "expected [2 + rows, channels]", key="of")  # fmt: skip
        count = seen.shape[1]
        for reader, w in zip(readers, weights, strict=True):
            if len(w.shape) != 2 or w.shape[0 if transposed else 1] != count:
                raise self.refuse(f"`{reader}.weight` is {list(w.shape)}, but its statistics are of {count} channels", key="of")
        self._sound(name)
        outputs = made_by.shape[-1 if transposed else 0]
        i, parts = feed.part
        first, makes = outputs // parts * i, outputs // parts
        repeat = count // makes if makes and count % makes == 0 else 0
        width = heads(self._said) if repeat > 1 and feed.where == "out" else 1
        if outputs % parts or repeat == 0 or (repeat > 1 and (feed.where != "out" or not width or makes % width)):
            raise self.refuse(
                f"`{source}` makes {makes} channels, and `{readers[0]}` reads {count}: it does not read its output alone",
                key="feeds",
            )
        scales = Scales(seen, weights, self, how=self.how, transposed=transposed, repeat=repeat, width=width or 1)
        return Moved(feed, source, first, readers, scales)

    def _keys(self, feed: Feed, source: str, keys: Expr, reader: str, queries: Expr) -> Moved | None:
        """Scales of the keys that `source` makes and the queries of `reader` meet."""
        seen = self.statistics.tensors.get(f"{source}.weight")
        if seen is None:
            return None
        self._sound(f"{source}.weight")
        width = heads(self._said)
        fits = len(keys.shape) == len(queries.shape) == len(seen.shape) == 2 and keys.shape[1] == seen.shape[1]
        if not width or width % 2 or not fits or keys.shape[0] % width or queries.shape[0] % keys.shape[0]:
            what = f"`{source}.weight` {list(keys.shape)} and `{reader}.weight` {list(queries.shape)}"
            raise self.refuse(f"{what} make no keys and queries of heads of {width or 'unknown'} channels", key="at")
        if (self._said.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise self.refuse("only a part of every head is turned by rotary embedding: pairs are not known", key="at")
        bias = self.inputs[0].tensors.get(f"{source}.bias")
        repeat = queries.shape[0] // keys.shape[0]
        scales = KeyScales(seen, keys, bias, self, how=self.how, repeat=repeat, width=width)
        return Moved(feed, source, 0, [reader], scales)

    def _weight(self, layer: str, role: str) -> Expr:
        model = self.inputs[0]
        expr = model.tensors.get(f"{layer}.weight")
        if expr is None:
            raise self.refuse(
                f"there is no `{layer}.weight`, which {role}: a layer without weight cannot absorb a scale", key="feeds",
                hint=did_you_mean(f"{layer}.weight", model.tensors),
            )  # fmt: skip
        if expr.dtype.name not in _FLOATS or len(expr.shape) not in (1, 2):
            what = f"{expr.dtype}, {len(expr.shape)}-dimensional" if expr.dtype.name in _FLOATS else f"{expr.dtype}"
            raise self.refuse(f"`{layer}.weight` is {what}; scales go through float vectors and matrices", key="of")
        return expr

    def _free(self, source: str, readers: Sequence[str]) -> None:
        """Refuse what is also used elsewhere under another name."""
        for node in sources_of(self.inputs[0]):
            for alias, canonical in node.ties.items() if not isinstance(node, StatisticsNode) else ():
                for layer in (source, *readers):
                    if f"{layer}.weight" in (alias, canonical):
                        other = canonical if f"{layer}.weight" == alias else alias
                        raise self.refuse(f"`{layer}.weight` is tied to `{other}`, which must not be scaled", key="feeds",
                                          hint="leave that layer out")  # fmt: skip

    def _range(self, name: str) -> Any:
        """The stored ranges of a layer's input channels, (2, channels) in float64."""
        stored = self.statistics.source.tensors[name]
        size = stored.dtype.size
        with open(stored.path, "rb") as file:
            file.seek(stored.offset)
            raw = file.read(2 * stored.shape[1] * size)
        return np.frombuffer(raw, f"<f{size}").astype(np.float64).reshape(2, -1)

    def _sound(self, name: str) -> None:
        low, high = self._range(name)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise self.refuse(f"{self.statistics.label}: `{name}` has no finite ranges of its channels", key="of",
                              hint="collect the statistics again; the model may overflow on these texts")  # fmt: skip

    def _alone(self, made: Sequence[Moved]) -> None:
        """Refuse layers named twice, and layers left out that see the very same numbers as one that is scaled."""
        readers: dict[str, str] = {}
        makers = set[str]()
        for m in made:
            if m.source in makers:
                raise self.refuse(f"`{m.source}` is named twice as what others read", key="feeds")
            makers.add(m.source)
            for reader in m.readers if m.feed.where != KEYS else ():
                if reader in readers:
                    raise self.refuse(f"`{reader}` is to read `{readers[reader]}` and `{m.source}`, but reads one", key="feeds")
                readers[reader] = m.source
        known = {n: self._range(n) for n in self.statistics.tensors}
        seen = {known[f"{r}.weight"].tobytes(): r for r in readers if f"{r}.weight" in known}
        for name, found in known.items():
            layer = name.removesuffix(".weight")
            twin = seen.get(found.tobytes())
            if twin is not None and layer not in readers and found.any() and name in self.inputs[0].tensors:
                raise self.refuse(f"`{layer}` sees the same inputs as `{twin}`: a scale for one must be for both", key="feeds",
                                  hint=f"name it beside `{twin}`")  # fmt: skip

    # -- tensors ---------------------------------------------------------------------------------------------------------

    def _rescaled(self, name: str, expr: Expr, made: Sequence[Moved]) -> Expr:
        layer, _, kind = name.rpartition(".")
        source = next((m for m in made if m.source == layer), None) if kind in ("weight", "bias") else None
        keyed = next((m for m in made if layer in m.readers and m.feed.where == KEYS), None)
        met = keyed if kind in ("weight", "bias") else None
        reader = next((m for m in made if layer in m.readers and m is not keyed), None) if kind == "weight" else None
        if source is None and reader is None and met is None:
            return expr
        transposed = (source or reader or met).scales.transposed and len(expr.shape) == 2  # type: ignore[union-attr]
        offset = source.feed.offset if source and kind == "weight" and len(expr.shape) == 1 else 0.0
        return Rescaled(
            expr, self, makes=(source.scales, source.first) if source else None, reads=reader.scales if reader else None,
            meets=met.scales if met and isinstance(met.scales, KeyScales) else None, transposed=transposed, offset=offset,
        )  # fmt: skip

    @property
    def text(self) -> str:
        how, bits = self.how, self.how.bits
        names = ", ".join(n.label or n.verb.lower() for n in self.inputs)
        said = f"{names} kind={how.kind} weight_bits={bits.weights} activation_bits={bits.activations}"
        more = [f"group={bits.group}"] if bits.group else []
        return " ".join([said, *more, *(["exact"] if how.exact else []), *([self._made] if self._made else [])])

    @property
    def identity(self) -> str:
        return f"{self.how!r}\0{self.only!r}\0{sorted(self.feeds.items())!r}"
