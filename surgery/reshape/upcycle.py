"""Dense models to mixtures of experts and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.source import open_source
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Node, SourceNode, sources_of
from surgery.graph.values import at, show
from surgery.reshape.layouts import LAYOUTS, PARTS, ROUTED_SCALE, Layout, dense_part, for_dense
from surgery.reshape.mixing import given, learned, unmatched
from surgery.reshape.parts import Noise

SHARED_SHARE = 0.5  # the shared expert's gate starts at sigmoid(0)


class UpcycleNode(Node):
    """The first input with its feed-forward layers turned into experts: copies, or those of the other inputs.

    With equal experts the mixture computes what the dense model does: the top experts' weights sum to one. In the layout with a
    shared expert (Qwen2-MoE) that one gets the dense weights and half of the output (its gate starts at sigmoid(0)), and the
    routed experts' down_proj are halved.
    """

    verb = "UPCYCLE"

    def __init__(
        self,
        inputs: Sequence[Node],
        label: str | None,
        where: Mapping[str, str],
        *,
        experts: int,
        top: int,
        gates: str,
        seed: int,
        shared: bool | None = None,
    ) -> None:
        super().__init__(label, where)
        self.models = tuple(inputs)
        self.routers = None if gates in ("random", "zero") else SourceNode(open_source(gates), "gates")
        self.inputs = self.models if self.routers is None else (*self.models, self.routers)
        self.experts, self.top, self.gates, self.seed = experts, top, gates, seed
        self.layout = self._layout(shared)
        if not 1 <= top <= experts:
            raise self.refuse(f"`top` must be from 1 to the number of experts ({experts}), got {top}", key="top")

    def _layout(self, shared: bool | None) -> Layout:
        config = self.inputs[0].config or {}
        kind = str(config.get("model_type"))
        layout = for_dense(kind, shared)
        if layout is None:
            choices = [t for one in LAYOUTS.values() if shared in (None, bool(one.shared)) for t in one.accepts]
            choices += [t for one in LAYOUTS.values() if shared for t in one.on_request]
            what = {None: "", True: " with a shared expert", False: " without a shared expert"}[shared]
            known = ", ".join(choices)
            raise self.refuse(f"upcycle{what} knows dense models of type {known}; this one is {kind}", key="of")
        if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
            name = "Mixtral" if layout.name == "mixtral" else "Qwen2-MoE's feed-forward layer and output projection"
            raise self.refuse(f"{name} has no biases, this model has: it cannot be upcycled to that layout", key="of")
        if kind in layout.on_request and config.get("sliding_window"):
            raise self.refuse("a sliding window of attention has no counterpart in Qwen2-MoE", key="shared")
        return layout

    def _build(self) -> dict[str, Expr]:
        dense = self.models[0].tensors
        made: dict[str, Expr] = {}
        sources = self.models[1:] or self.models * self.experts
        for name, expr in dense.items():
            found = dense_part(name)
            if found is None:
                made[name] = expr
                continue
            block, part = found
            if part == PARTS[0]:
                made |= self._router(block, expr)
            if self.layout.shared:
                made[self.layout.shared_name(block, part)] = expr
            for e, node in enumerate(sources):
                made[self.layout.expert_name(block, e, part)] = self._expert(name, part, node, expr)
        if not any(dense_part(name) for name in dense):
            raise self.refuse("no feed-forward matrices (`….layers.N.mlp.up_proj.weight`) in the dense model", key="of")
        return made

    def _expert(self, name: str, part: str, node: Node, like: Expr) -> Expr:
        expr = node.tensors.get(name)
        if expr is None or expr.shape != like.shape:
            found = "is missing" if expr is None else f"is {list(expr.shape)}"
            raise self.refuse(f"`{name}` {found} in {node.label}, the dense model has {list(like.shape)}", key="of")
        if self.layout.shared and part == "down_proj":
            return weighted([1.0 - SHARED_SHARE], [expr], expr.shape, expr.dtype, self)
        return expr

    def _router(self, block: str, up: Expr) -> dict[str, Expr]:
        name = self.layout.router.format(block=block)
        shape = (self.experts, up.shape[1])
        made: dict[str, Expr] = {}
        if self.routers is not None:
            expr = self.routers.tensors.get(name)
            if expr is None or expr.shape != shape:
                found = "is missing" if expr is None else f"is {list(expr.shape)}"
                raise self.refuse(f"`{name}` {found} in {self.gates}, expected {list(shape)}", key="gates")
            made[name] = expr
        elif self.gates == "zero":
            made[name] = weighted([], [], shape, up.dtype, self)
        else:
            made[name] = Noise(shape, up.dtype, self, scale=0.02, seed=self.seed, key=name)
        if self.layout.shared:
            gate = self.layout.shared_gate.format(block=block)
            made[gate] = weighted([], [], (1, up.shape[1]), up.dtype, self)
        return made

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        if config is None:
            return None
        made = self.layout.config(config, self.experts, self.top)
        return made | ({ROUTED_SCALE: 1.0 - SHARED_SHARE} if self.layout.shared else {})

    @property
    def text(self) -> str:
        return f"{self.layout.name} experts={self.experts} top={self.top} gates={self.gates} seed={self.seed}"


class DowncycleNode(Node):
    """A mixture's experts mixed into one dense feed-forward layer each.

    dense = shared_weight * shared + (1 - shared_weight) * sum_i weights_i expert_i; without a shared expert the sum alone.
    """

    verb = "DOWNCYCLE"

    def __init__(
        self,
        node: Node,
        label: str | None,
        where: Mapping[str, str],
        *,
        shared_weight: float | Mapping[str, float],
        weights: str | Sequence[float] | Mapping[str, Sequence[float]] | None,
    ) -> None:
        super().__init__(label, where)
        self.inputs = (node,)
        self.shared_weight, self.weights = shared_weight, weights
        config = node.config or {}
        found = LAYOUTS.get(str(config.get("model_type")))
        if found is None:
            raise self.refuse(f"downcycle knows {', '.join(LAYOUTS)}; this model is {config.get('model_type')}", key="of")
        self.layout = found
        self.experts = int(config.get(found.count, 0))
        self.routed_scale = float(config.get(ROUTED_SCALE, 1.0))
        try:
            if isinstance(weights, str):
                self._shares = learned(Path(weights), self.experts, [s.source for s in sources_of(node)])
            else:
                self._shares = given(weights, self.experts)
        except ValueError as problem:
            raise self.refuse(str(problem), key="weights") from None

    def _build(self) -> dict[str, Expr]:
        tensors, layout = self.inputs[0].tensors, self.layout
        made: dict[str, Expr] = {}
        known: dict[str, tuple[str, str]] = {}
        gone: set[str] = set()
        blocks = [name.removesuffix(layout.router.removeprefix("{block}")) for name in tensors if self._is_router(name)]
        for block in blocks:
            gone |= {layout.router.format(block=block), layout.shared_gate.format(block=block)}
            for part in PARTS:
                names = [layout.expert_name(block, e, part) for e in range(self.experts)]
                names += [layout.shared_name(block, part)] if layout.shared else []
                known |= dict.fromkeys(names, (block, part))
        if not blocks:
            raise self.refuse("no router in this model: it has no experts", key="of")
        for name, expr in tensors.items():
            if name in gone:
                self.dropped[name] = "a router: the dense model has none"
            elif name not in known:
                made[name] = expr
            else:
                block, part = known[name]
                dense = f"{block}.mlp.{part}.weight"
                if dense not in made:
                    made[dense] = self._mixed(dense, block, part)
        for key, value in (("weights", self.weights), ("shared_weight", self.shared_weight)):
            glob = unmatched(value, [f"{b}.mlp.{p}.weight" for b in blocks for p in PARTS])
            if glob is not None:
                raise self.refuse(f"`{key}`: no feed-forward matrix matches `{glob}`", key=key)
        return made

    @property
    def share_of_shared(self) -> float:
        """The shared expert's share where it is one number for all."""
        assert isinstance(self.shared_weight, int | float)
        return float(self.shared_weight)

    def experts_of(self, dense: str) -> tuple[Expr | None, list[Expr]]:
        """What the matrix `….mlp.PART.weight` is mixed from: the shared expert's, if there is one, and the routed ones'."""
        block, _, rest = dense.rpartition(".mlp.")
        part = rest.removesuffix(".weight")
        tensors, layout = self.inputs[0].tensors, self.layout
        undo = 1.0 / self.routed_scale if part == "down_proj" else 1.0
        routed = [tensors[layout.expert_name(block, e, part)] for e in range(self.experts)]
        routed = [weighted([undo], [x], x.shape, x.dtype, self) for x in routed]
        return tensors[layout.shared_name(block, part)] if layout.shared else None, routed

    def _is_router(self, name: str) -> bool:
        return name.endswith(self.layout.router.removeprefix("{block}"))

    def _mixed(self, dense: str, block: str, part: str) -> Expr:
        tensors, layout = self.inputs[0].tensors, self.layout
        shared = at(self.shared_weight, dense, 0.0, None)
        if shared is None:
            raise self.refuse(f"no glob of `shared_weight` matches `{dense}`; end the map with \"*\"", key="shared_weight")
        try:
            weights = self._shares(dense)
        except ValueError as problem:
            raise self.refuse(str(problem), key="weights") from None
        routed = (1.0 - shared) if layout.shared else 1.0
        undo = 1.0 / self.routed_scale if part == "down_proj" else 1.0
        coefs = [routed * w * undo for w in weights]
        names = [layout.expert_name(block, e, part) for e in range(self.experts)]
        if layout.shared:
            coefs.append(shared)
            names.append(layout.shared_name(block, part))
        lacking = [n for n in names if n not in tensors]
        if lacking:
            raise self.refuse(f"`{lacking[0]}` is missing: the model's experts are not stored one by one", key="of")
        args = [tensors[n] for n in names]
        return weighted(coefs, args, args[0].shape, args[0].dtype, self)

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        return config and self.layout.dense_config(config)

    @property
    def text(self) -> str:
        weights = "equal" if self.weights is None else self.weights if isinstance(self.weights, str) else show(self.weights)
        return f"shared_weight={show(self.shared_weight)} weights={weights}"
