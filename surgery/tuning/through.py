"""Training through rounding: the forward pass sees rounded matrices, gradients reach floating-point ones behind them.

    weights   Q(W);  with an adapter Q(W + D), D its change: merged, then rounded (EfficientDM, He et al., arXiv 2310.03270)
    delta     W0 + Q(W - W0);  with an adapter W0 + Q(W + D - W0)
    adapter   the adapter's factors rounded, Q(A) and Q(B) (Jie et al. 2023, arXiv 2307.16867)
    base      Q(W0) + D: rounded first, the adapter floating point (QLoRA, INT2.1)

While it trains Q is that of `grids`. What is left in the model at the end went through the lossy codec itself, so that a
package written with it holds just that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from surgery.delta.codecs.base import Coded, lossy_codec
from surgery.delta.lossy.common import Codec
from surgery.errors import Refused
from surgery.tuning.grids import Grid, count, rounded

HELD = "surgery_step_"  # learned log steps' names in the live model while it trains


@dataclass
class Rounded:
    """One matrix. name: as the model without adapters knows it. parameter: the live one; start: its values before training,
    where they count. layer: peft's around it, where its change is rounded with it. weak: columns that are not rounded."""

    name: str
    parameter: Any
    start: Any = None
    layer: Any = None
    weak: Any = None
    slots: list[tuple[Any, str]] = field(default_factory=list)

    def latent(self) -> Any:
        """What is rounded, in floating point; differentiable."""
        made = self.parameter
        if self.layer is not None:
            made = made + sum(self.layer.get_delta_weight(name) for name in self.layer.active_adapters)
        if self.start is not None:
            made = made - self.start
        return made if self.weak is None else torch.where(self.weak, 0.0, made)

    def whole(self, made: Any) -> Any:
        """The matrix that the model sees, of what was rounded."""
        if self.weak is not None:
            made = torch.where(self.weak, self.parameter, made)
        return made if self.start is None else self.start + made


class Through:
    """options: of the tune file, complete. model: with its adapter, if any. matrices: the base's own, name -> (parameter, its
    values before an adapter came). trained: what the method trains, name -> parameter. weak: name -> mask of columns that are
    not rounded, of the method `columns`."""

    def __init__(
        self,
        model: Any,
        matrices: Mapping[str, tuple[Any, Any]],
        trained: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        weak: Mapping[str, Any] | None = None,
    ) -> None:
        self.of: str = options["of"]
        self._model, self._options = model, options
        self._codec = lossy_codec(options["codec"])
        self.grid = grid_of(options)
        self._given = self.grid.options
        self._trust: bool = options["trust"]
        self._merged = self.of in ("weights", "delta") and hasattr(model, "peft_config")
        self._on, self._done = True, False
        self.coded: dict[str, Coded] = {}
        self.targets = self._chosen(matrices, trained, weak or {})
        if not self.targets:
            raise Refused(f"through: of: {self.of}: nothing that is trained is such a matrix inside the blocks")
        ids = {id(t.parameter): t for t in self.targets}
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None and id(p) in ids:
                    ids[id(p)].slots.append((module, key))
        self.parameters: dict[str, Any] = {}
        if options["learned"]:
            for number, target in enumerate(self.targets):
                many = count(target.latent().detach(), self.grid)
                steps = torch.nn.Parameter(torch.zeros(many, device=target.parameter.device))
                self.parameters[f"{target.name}.step"] = steps
                model.register_parameter(f"{HELD}{number}", steps)  # so that gradients are clipped together
        if self.of == "base":
            self._round_base()

    def _chosen(
        self, matrices: Mapping[str, tuple[Any, Any]], trained: Mapping[str, Any], weak: Mapping[str, Any]
    ) -> list[Rounded]:
        layers = _layers(self._model) if self._merged else {}
        if self.of == "adapter":
            return [Rounded(n, p) for n, p in trained.items() if _factor(n) and p.ndim >= 2]
        if self.of in ("weights", "base"):
            kept = {n: m.to(matrices[n][0].device) for n, m in weak.items()}
            return [Rounded(n, p, layer=layers.get(id(p)), weak=kept.get(n)) for n, (p, _) in matrices.items()]
        ids = {id(p) for p in trained.values()} | set(layers)
        return [Rounded(n, p, s.to(p.device), layers.get(id(p))) for n, (p, s) in matrices.items() if id(p) in ids]

    @property
    def names(self) -> list[str]:
        return [t.name for t in self.targets]

    # -- while it trains -------------------------------------------------------------------------------------------------

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside, the model's forward pass sees rounded matrices."""
        if not self._on or self.of == "base":
            yield
            return
        try:
            for target in self.targets:
                made = target.whole(rounded(target.latent(), self.grid, trust=self._trust, learned=self._steps(target)))
                for module, key in target.slots:
                    module._parameters[key] = made
                self._switch(target, off=True)
            yield
        finally:
            for target in self.targets:
                for module, key in target.slots:
                    module._parameters[key] = target.parameter
                self._switch(target, off=False)

    def _steps(self, target: Rounded) -> Any:
        return self.parameters.get(f"{target.name}.step")

    @staticmethod
    def _switch(target: Rounded, *, off: bool) -> None:
        """The adapter's change is inside the matrix meanwhile."""
        if target.layer is not None:
            target.layer._disable_adapters = off

    @torch.no_grad()
    def _round_base(self) -> None:
        for target in self.targets:
            target.parameter.copy_(self._through_codec(target))
        self._on = False

    # -- afterwards ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """Leave in the model what is to be written; nothing is rounded from here on."""
        if not self._on:
            return
        for target in self.targets:
            learned = self._steps(target)
            latent = target.latent()
            made = self._through_codec(target) if learned is None else rounded(latent, self.grid, learned=learned)
            target.parameter.copy_(target.whole(made))
            self._switch(target, off=True)
        self._on, self._done = False, True

    def release(self) -> Any:
        """The model without learned steps and, after `finish`, without an adapter that is inside its matrices."""
        for number in range(len(self.parameters)):
            self._model._parameters.pop(f"{HELD}{number}", None)
        if not (self._merged and self._done):
            return self._model
        kept = [(t, t.parameter.detach().clone()) for t in self.targets]
        for target in self.targets:
            self._switch(target, off=False)
        model = self._model.merge_and_unload()
        with torch.no_grad():
            for target, value in kept:
                target.parameter.copy_(value)
        return model

    def _through_codec(self, target: Rounded) -> Any:
        latent = target.latent().detach()
        value = np.ascontiguousarray(latent.cpu().numpy(), np.float32)
        coded = self._codec.encode(value, key=target.name, **self._given)
        if self.of == "delta":
            self.coded[target.name] = coded
        made = self._codec.decode(coded, value.shape, target.name, 0, value.size).reshape(value.shape)
        return torch.from_numpy(made).to(latent.device)


def grid_of(options: Mapping[str, Any]) -> Grid:
    """Of a tune file's `through`."""
    codec = lossy_codec(options["codec"])
    return Grid.KINDS[options["codec"]]({k: options[k] for k in codec.options if k in options})


class Trained(Codec):
    """A codec that has coded already: what a delta was trained through. To pack with."""

    streams = True

    def __init__(self, codec: str, coded: Mapping[str, Coded]) -> None:
        self._inner, self._coded = lossy_codec(codec), coded
        self.name, self.options = self._inner.name, {}

    def encode(self, delta: Any, *, key: str, **_: Any) -> Coded:
        return Coded(self._coded[key].parts, {k: v for k, v in self._coded[key].facts.items() if k not in ("error", "bits")})

    def decode(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Any:
        return self._inner.decode(coded, shape, key, start, stop)


def _factor(name: str) -> bool:
    """True for what an adapter consists of; a copy of a whole module (a new head) is none."""
    return "modules_to_save" not in name and any(part.startswith(("lora_", "hada_", "lokr_")) for part in name.split("."))


def _layers(model: Any) -> dict[int, Any]:
    """id of a base matrix -> peft's layer around it. Raises Refused for adapters that are more than a sum."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module.get_base_layer(), "weight"):
            continue
        if not hasattr(module, "get_delta_weight") or getattr(module, "lora_variant", None):
            raise Refused(f"through: `{name}` has an adapter whose change is no sum with the matrix", hint="plain lora has one")
        drops = [d for d in (getattr(module, "lora_dropout", None) or {}).values() if getattr(d, "p", 0.0) > 0.0]
        if drops:
            raise Refused("through: lora_dropout acts beside the matrix, and the adapter is rounded with it",
                          hint="lora_dropout: 0, or through.of: adapter")  # fmt: skip
        found[id(module.get_base_layer().weight)] = module
    return found
