"""Averages of the weights over a training run. Each keeps a state that goes into saved checkpoints.

All count in the type of the parameters, which while training is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Average:
    """Of some parameters. `on_step` and `on_epoch` are called after each update and each pass over the data."""

    def __init__(self, parameters: Mapping[str, Any], **options: Any) -> None:
        self.parameters = parameters
        self.options = options

    def on_step(self, step: int, total: int, optimizer: Any) -> None:
        """step: updates done; total: updates of the whole run; optimizer: the torch optimizer."""

    def on_epoch(self, step: int, total: int, optimizer: Any) -> None:
        """As on_step, at the end of a pass over the data."""

    def finish(self) -> bool:
        """Put the result into the parameters; True if they changed."""
        return False

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""

    def _copies(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Any]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def _placed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v.to(self.parameters[n].device) for n, v in values.items()}


class Ema(Average):
    """avg <- decay avg + (1 - decay) theta after every step, from theta_0 on. The result is the average.

    From theta_0 on, as in momentum weight interpolation (Stojanovski et al. 2022, arXiv 2211.03186): a short run stays near
    it. With debias theta_0 has no share: the average is divided by 1 - decay^t, as Adam's moments are.
    """

    def __init__(self, parameters: Mapping[str, Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.average = self._copies()

    @torch.no_grad()
    def on_step(self, step: int, total: int, optimizer: Any) -> None:
        decay = self.options["decay"]
        share = 1.0 - decay
        if self.options.get("debias"):
            share /= 1.0 - decay**step
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach(), share)

    def finish(self) -> bool:
        self._assign(self.average)
        return True

    def state(self) -> dict[str, Any]:
        return dict(self.average)

    def load(self, state: Mapping[str, Any]) -> None:
        self.average = self._placed(state)


class Swa(Average):
    """The mean of the states at the ends of epochs (or every `every` steps) once the share `start` of the run is done.

    Izmailov et al. 2018, arXiv 1803.05407. A constant learning rate suits it. Without a state in reach nothing is averaged.
    """

    def __init__(self, parameters: Mapping[str, Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.average: dict[str, Any] = {}
        self.count = 0

    def on_step(self, step: int, total: int, optimizer: Any) -> None:
        every = self.options.get("every")
        if every and step % every == 0:
            self._take(step, total)

    def on_epoch(self, step: int, total: int, optimizer: Any) -> None:
        if not self.options.get("every"):
            self._take(step, total)

    @torch.no_grad()
    def _take(self, step: int, total: int) -> None:
        if step <= self.options["start"] * total:
            return
        self.count += 1
        if not self.average:
            self.average = self._copies()
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach(), 1.0 / self.count)

    def finish(self) -> bool:
        if self.count:
            self._assign(self.average)
        return self.count > 0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "average": self.average}

    def load(self, state: Mapping[str, Any]) -> None:
        self.count, self.average = state["count"], self._placed(state["average"])


class Elastic(Average):
    """Elastic Reset (Noukhovitch et al. 2023, arXiv 2312.07551): a moving average, and every `every` steps

        theta <- average,   average <- theta_0

    with the optimizer's moments dropped, if asked: they belong to where theta was. The result is theta.
    """

    def __init__(self, parameters: Mapping[str, Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.start = self._copies()
        self.average = self._copies()

    @torch.no_grad()
    def on_step(self, step: int, total: int, optimizer: Any) -> None:
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach(), 1.0 - self.options["decay"])
        if step % self.options["every"] == 0:
            self._assign(self.average)
            self.average = {n: v.clone() for n, v in self.start.items()}
            if self.options["reset_optimizer"]:
                optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        return dict(self.average)

    def load(self, state: Mapping[str, Any]) -> None:
        self.average = self._placed(state)


class Stock(Average):
    """Model Stock during training (Jang et al. 2024, arXiv 2403.19522): several models side by side, merged after every epoch.

    The data is passed over `runs` times per epoch, each time by another model from the same start, in another order and with
    its own optimizer moments. Then all are replaced by `stock(theta_0, models)`, per tensor. The result is the last merge.
    """

    def __init__(self, parameters: Mapping[str, Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.runs: int = options["runs"]
        self.base = self._copies()
        self.start = self._copies()
        self.done: list[dict[str, Any]] = []
        self.moments: list[list[dict[str, Any]]] = [[] for _ in range(self.runs)]

    def on_epoch(self, step: int, total: int, optimizer: Any) -> None:
        order = list(self.parameters.values())
        self.moments[len(self.done)] = [dict(optimizer.state.get(p, {})) for p in order]
        self.done.append(self._copies())
        if len(self.done) == self.runs:
            self.start = {n: self._merged(n) for n in self.parameters}
            self.done = []
        self._assign(self.start)
        optimizer.state.clear()
        for p, moments in zip(order, self.moments[len(self.done)], strict=False):
            if moments:
                optimizer.state[p] = moments

    def _merged(self, name: str) -> Any:
        from surgery.ops import registry
        from surgery.ops.eager import apply_to_tensors

        p = self.parameters[name]
        merged = apply_to_tensors(registry["stock"], [self.base[name].cpu(), *(d[name].cpu() for d in self.done)], {})
        return merged.to(device=p.device, dtype=p.dtype)

    def state(self) -> dict[str, Any]:
        return {"start": self.start, "done": self.done, "moments": self.moments}

    def load(self, state: Mapping[str, Any]) -> None:
        self.start, self.done = self._placed(state["start"]), [self._placed(d) for d in state["done"]]
        self.moments = [
            [{k: v.to(p.device) if torch.is_tensor(v) and v.ndim else v for k, v in m.items()}
             for p, m in zip(self.parameters.values(), run, strict=False)]
            for run in state["moments"]
        ]  # fmt: skip


KINDS: dict[str, type[Average]] = {"ema": Ema, "swa": Swa, "elastic": Elastic, "stock": Stock}
