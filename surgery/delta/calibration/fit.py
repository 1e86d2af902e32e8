"""Fitting codes to a model's layers, in the order in which it runs.

A layer's inputs come from the model as its readers will have it: everything before that layer is rebuilt already. So errors of
earlier layers are seen, and made up for, by later ones; what runs after is still as it was tuned, and does not matter yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.delta.calibration.data import Tuned
from surgery.delta.calibration.layers import in_order, inputs_of
from surgery.delta.codecs.base import LOSSY, Coded, Lossy
from surgery.delta.deltas import Deltas
from surgery.delta.lossy.inputs import Inputs
from surgery.delta.manifest import Tensor
from surgery.delta.pack import Choose
from surgery.statistics.node import StatisticsNode

Plan = Mapping[str, tuple[Lossy, Mapping[str, Any]]]
Step = Callable[[int, int], None]


@dataclass
class Ready:
    """A lossy codec that has coded one tensor already."""

    coded: Coded
    name: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def encode(self, delta: NDArray[np.float32], *, key: str, **options: Any) -> Coded:
        return self.coded

    def room(self, shape: tuple[int, ...], **options: Any) -> int:
        return 4 * int(np.prod(shape))

    def decode(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> NDArray[np.float32]:
        return LOSSY[self.name].decode(coded, shape, key, start, stop)


@dataclass
class Fitted:
    """codes: of every tensor that was coded. blind: those without inputs, coded as without data."""

    codes: dict[str, tuple[Lossy, Coded]] = field(default_factory=dict)
    blind: list[str] = field(default_factory=list)

    def choose(self, tensor: Tensor) -> tuple[Lossy, Mapping[str, Any]] | None:
        found = self.codes.get(tensor.name)
        return None if found is None else (Ready(found[1], found[0].name), {})


def planned(deltas: Deltas, tensors: Mapping[str, Tensor], choose: Choose) -> Plan:
    """What `choose` says of every tensor that has a delta."""
    made = {}
    for name in deltas:
        choice = choose(tensors[name])
        if choice is not None:
            made[name] = choice
    return made


def coded_with(codec: Lossy, delta: Any, name: str, inputs: Inputs | None, options: Mapping[str, Any]) -> Coded:
    given = {"inputs": inputs} if inputs is not None and getattr(codec, "calibrated", False) else {}
    return codec.encode(delta, key=name, **given, **options)


def fit_to_texts(deltas: Deltas, plan: Plan, tuned: Tuned, texts: Sequence[list[int]], step: Step) -> Fitted:
    """Code every tensor of `plan`, layer by layer. `tuned` holds the rebuilt model afterwards.

    Tensors that are no linear layer's weight (embeddings, vectors, experts that no text reaches) are coded without data, first.
    """
    made = Fitted()
    groups = in_order(tuned.live, texts, set(plan))
    layers = {layer.name for group in groups for layer in group}
    done, total = 0, len(plan)

    def finish(name: str, inputs: Inputs | None) -> None:
        nonlocal done
        codec, options = plan[name]
        found = coded_with(codec, deltas.delta(name), name, inputs, options)
        made.codes[name] = codec, found
        if inputs is None or not getattr(codec, "calibrated", False):
            made.blind.append(name)
        if name in tuned.parameters:
            tuned.hold(name, deltas.rebuilt(name, codec, found))
        done += 1
        step(done, total)

    for name in plan:
        if name not in layers:
            finish(name, None)
    for group in groups:
        needed = any(getattr(plan[layer.name][0], "calibrated", False) for layer in group)
        inputs = inputs_of(tuned.live, texts, group[0]) if needed else None
        for layer in group:
            finish(layer.name, inputs)
    return made


def fit_to_statistics(deltas: Deltas, plan: Plan, grams: StatisticsNode, step: Step) -> Fitted:
    """Code every tensor of `plan` with Gram matrices that were collected from the tuned model."""
    made = Fitted()
    for i, (name, (codec, options)) in enumerate(plan.items(), 1):
        inputs = gram_of(grams, name) if getattr(codec, "calibrated", False) else None
        if inputs is None:
            made.blind.append(name)
        made.codes[name] = codec, coded_with(codec, deltas.delta(name), name, inputs, options)
        step(i, len(plan))
    return made


def gram_of(grams: StatisticsNode, name: str) -> Inputs | None:
    """The Gram matrix of a tensor's inputs, stored (n, n), or (n, n, 1) for weights that are stored (in, out)."""
    from safetensors import safe_open

    stored = grams.source.tensors.get(name)
    if stored is None:
        return None
    with safe_open(stored.path, framework="numpy") as file:
        gram = file.get_tensor(name)
    return Inputs(gram[:, :, 0], axis=0) if gram.ndim == 3 else Inputs(gram)
