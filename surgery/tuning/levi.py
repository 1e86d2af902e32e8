"""A frozen pretrained model and a small one trained beside it, mixed layer by layer into a head.

Roh et al. 2024, LEVI: Generalizable fine-tuning via layer-wise ensemble of different views, arXiv 2402.04644.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from surgery.errors import Refused
from surgery.lab.fused_module import output
from surgery.lab.subject import Subject
from surgery.lab.traced import blocks_of


class LayerwiseEnsemble(nn.Module):
    """Logits `head(gelu(sum_v softmax(mix)_v (P_v norm(h_v) + b_v)))`, a view v for every block of both models.

    h_v is what block v gives: (n, d) as it is, (n, tokens, d) averaged over tokens (by `attention_mask`, where one is given).
    The pretrained model is frozen, stays in eval mode, and is neither among the parameters nor in the state: what is trained
    and saved are the small model, projections, mix and head. Both models get the same inputs; any torch modules with a list of
    blocks.

    example: inputs to find widths with, a tensor or a dict of named ones. classes: of the head. width: of the mixture. Train it
    with `tune`, measure it with `lab.evaluate`. Raises Refused for modules without blocks, and blocks that give no such states.
    """

    base_model_prefix = ""  # tells `Parts` that no layer is a head but those said

    def __init__(self, pretrained: Any, small: Any, example: Any, *, classes: int, width: int = 64) -> None:
        super().__init__()
        self._frozen = (pretrained.requires_grad_(False).eval(),)  # in a tuple: no part of this module's state
        self.small = small
        names, self._blocks = [], []
        for kind, model in (("pretrained", pretrained), ("small", small)):
            found, blocks = blocks_of(Subject(model, f"the {kind} model"))
            names += [f"{kind}.{n}" for n in found]
            self._blocks.append(blocks)
        self.names = names
        self.config = getattr(pretrained, "config", None)
        with torch.no_grad():
            states = self._states(*_inputs(example))
        self.views = nn.ModuleList(nn.Sequential(nn.LayerNorm(h.shape[-1]), nn.Linear(h.shape[-1], width)) for h in states)
        self.mix = nn.Parameter(torch.zeros(len(states)))
        self.head = nn.Linear(width, classes)
        if self.config is not None:
            self.stands_for = "LayerwiseEnsembleForSequenceClassification"

    @property
    def shares(self) -> dict[str, float]:
        """How much each block counts, of both models together: block -> share."""
        return dict(zip(self.names, torch.softmax(self.mix.detach(), dim=0).tolist(), strict=True))

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Logits (n, classes): a tensor for positional arguments, `.logits` for named ones."""
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        shares = torch.softmax(self.mix, dim=0)
        mixed = sum(a * view(h) for a, view, h in zip(shares, self.views, self._states(args, inputs), strict=True))
        return output(self.head(nn.functional.gelu(mixed)), args, inputs)

    def get_input_embeddings(self) -> Any:
        """Of the pretrained model."""
        return self._frozen[0].get_input_embeddings()

    def _states(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> list[Any]:
        """What every block gives (n, d), the pretrained model's first."""
        seen: dict[tuple[int, int], Any] = {}

        def keep(*key: int) -> Any:
            def hook(block: Any, given: Any, out: Any) -> None:
                seen[key[0], key[1]] = out if torch.is_tensor(out) else out[0]

            return hook

        handles = [b.register_forward_hook(keep(m, i)) for m, blocks in enumerate(self._blocks) for i, b in enumerate(blocks)]
        try:
            with torch.no_grad():
                self._frozen[0](*args, **inputs)
            self.small(*args, **inputs)
        finally:
            for handle in handles:
                handle.remove()
        mask = inputs.get("attention_mask")
        keys = [(m, i) for m, blocks in enumerate(self._blocks) for i in range(len(blocks))]
        return [_pooled(seen.get(k), mask, name) for k, name in zip(keys, self.names, strict=True)]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._frozen[0]._apply(fn, recurse)  # goes along to devices and types
        return super()._apply(fn, recurse)


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})


def _pooled(states: Any, mask: Any, name: str) -> Any:
    if states is None or states.ndim not in (2, 3):
        found = "did not run" if states is None else f"gives {list(states.shape)}"
        raise Refused(f"{name} {found}, expected (examples, width) or (examples, tokens, width)")
    if states.ndim == 2:
        return states
    if mask is None:
        return states.mean(dim=1)
    mask = mask.to(states).unsqueeze(-1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)
