"""A fine-tuned model whose every block runs beside the base's: what each of the two adds is told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.errors import Refused
from surgery.lab.outcome import Array
from surgery.lab.subject import Subject


class Traced(nn.Module):
    """The tuned model, with every block's output split in two. records: (TuCo, share per block, error) of every batch's
    rows, while it is a list."""

    def __init__(self, tuned: Subject, base: Subject, gamma: float = 1.0) -> None:
        super().__init__()
        self.tuned, self.base, self.gamma = tuned.module, base.module, gamma
        self.call = tuned.forward
        self.names, self.blocks = blocks_of(tuned)
        other, self.others = blocks_of(base)
        if self.names != other:
            raise Refused(
                f"{tuned.name} has blocks {self.names[0]} to {self.names[-1]}, {base.name} {other[0]} to {other[-1]}: they "
                "cannot be compared block by block"
            )
        self.stands_for, self.config = tuned.kind, getattr(tuned.module, "config", None)
        self.records: list[tuple[Array, Array, Array]] | None = None
        self.eval()

    def get_input_embeddings(self) -> Any:
        return self.tuned.get_input_embeddings()

    def forward(self, *args: Any, **inputs: Any) -> Any:
        start: list[Any] = []
        pre: list[Any] = []
        fine: list[Any] = []
        end: list[Any] = []

        def split(i: int) -> Any:
            def hook(block: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
                x = given[0] if given else named["hidden_states"]
                tuned, base = _states(out), _states(self.others[i](*given, **named))
                start[:] = start or [x]
                pre.append(base - x)
                fine.append(tuned - base)
                made = tuned if self.gamma == 1.0 else base + self.gamma * (tuned - base)
                end[:] = [made]
                return made if torch.is_tensor(out) else (made, *out[1:])

            return hook

        handles = [b.register_forward_hook(split(i), with_kwargs=True) for i, b in enumerate(self.blocks)]
        try:
            with _without_cache(self.config):
                plain = self.call is not None and args and not inputs
                found = self.call(self.tuned, *args) if plain and self.call else self.tuned(*args, **inputs)
        finally:
            for handle in handles:
                handle.remove()
        if self.records is not None:
            self.records.append(_shares(start[0], pre, fine, end[0], inputs.get("attention_mask")))
        return found


def _shares(start: Any, pre: Sequence[Any], fine: Sequence[Any], end: Any, mask: Any) -> tuple[Array, Array, Array]:
    """Rows of TuCo (rows,), of FTC's share per block (rows, blocks), and of the decomposition's relative error (rows,)."""

    def last(x: Any) -> Any:
        if x.ndim < 3:
            return x.double()
        at = torch.full((len(x),), x.shape[1] - 1) if mask is None else mask.sum(dim=1) - 1
        return x[torch.arange(len(x)), at].double()

    def share(fine: Any, pre: Any) -> Any:
        f, p = fine.norm(dim=-1), pre.norm(dim=-1)
        return torch.where(f + p > 0, f / (f + p), 0.0)

    pres, fines = [last(x) for x in pre], [last(x) for x in fine]
    whole = last(end)
    error = (last(start) + sum(pres) + sum(fines) - whole).norm(dim=-1) / whole.norm(dim=-1)
    layers = torch.stack([share(f, p) for f, p in zip(fines, pres, strict=True)], dim=1)
    return share(sum(fines), sum(pres)).cpu().numpy(), layers.cpu().numpy(), error.cpu().numpy()


def _states(out: Any) -> Any:
    return out if hasattr(out, "shape") else out[0]


def blocks_of(subject: Subject) -> tuple[list[str], list[Any]]:
    """Names and modules of the residual blocks: the longest list of modules in the model. Raises Refused."""
    lists = [(name, m) for name, m in subject.module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    name, found = max(lists, key=lambda item: len(item[1]), default=("", []))
    if len(found) < 2:
        raise Refused(f"{subject.name}: a {subject.kind} has no list of blocks", hint="they must be in a torch.nn.ModuleList")
    return [f"{name}.{i}" for i in range(len(found))], list(found)


@contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """Blocks of two models must not write to one cache."""
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
