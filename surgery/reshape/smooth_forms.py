"""`smooth` as a step of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.graph.forms import STRINGS, form
from surgery.graph.node import Node
from surgery.ops.smooth import KINDS, Bits
from surgery.reshape.feeds import KEYS, WHERE
from surgery.reshape.rescaled import How
from surgery.reshape.smooth import SmoothNode

_BITS = {"type": "integer", "minimum": 2, "maximum": 16}
_KEYS: dict[str, Any] = {
    "kind": {"enum": list(KINDS), "description": "adaptive (QQQ, default), grid (AWQ) or fixed (SmoothQuant)"},
    "weight_bits": _BITS | {"description": "of the weights that the scale is chosen for (default 4; 16: not quantised)"},
    "activation_bits": _BITS | {"description": "of the activations, per token (default 8; 16: not quantised)"},
    "group": {"type": "integer", "minimum": 1, "description": "inputs of a weight that share a step (default: all)"},
    "alpha": {"type": "number", "minimum": 0, "maximum": 1, "description": "of kind fixed, and of keys (default 0.5)"},
    "steps": {"type": "integer", "minimum": 1, "description": "candidates (default: adaptive 100, grid 20)"},
    "floor": {"type": "number", "exclusiveMinimum": 0, "description": "the lowest bound of kind adaptive (default 0.1)"},
    "exact": {"type": "boolean", "description": "powers of two: no weight loses a digit (default false)"},
    "at": {
        "anyOf": [{"enum": [*WHERE, KEYS]}, {"type": "array", "items": {"enum": [*WHERE, KEYS]}, "minItems": 1}],
        "description": f"one or more of {', '.join(WHERE)} (default: these: after norms, after values, before the last "
        f"feed-forward layer) and {KEYS} (between queries and keys)",
    },
    "feeds": {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": STRINGS,
        "description": 'a map of a layer to those that read its output and nothing else does: {"{block}.ln": "{block}.fc1"}',
    },
}


@form("smooth", takes="model, statistics of inputs", at_least=2, keys=_KEYS)
def smooth(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    kind: str = "adaptive",
    weight_bits: int = 4,
    activation_bits: int = 8,
    group: int | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    floor: float | None = None,
    exact: bool = False,
    at: str | Sequence[str] | None = None,
    feeds: Mapping[str, Any] | None = None,
) -> Node:
    """The same function with scales of channels moved into norms and preceding layers, easier to quantise.

    of: a model, and its statistics of kind `inputs`. A layer's inputs are divided by s, one number per channel, and its weights
    multiplied; what makes the inputs (a norm, the values of attention, the ungated half of a feed-forward layer) absorbs the
    division. s is chosen for the quantisers named, on the sampled inputs. adaptive scales only channels that leave a bound,
    which is searched from the largest magnitude down to `floor` (Zhang et al. 2024, QQQ, arXiv 2406.09904); grid raises mean
    magnitudes to powers (Lin et al. 2024, AWQ, arXiv 2306.00978); fixed takes max|X|^alpha / max|W|^(1 - alpha) (Xiao et al.
    2023, SmoothQuant, arXiv 2211.10438). at: keys scales keys by max|k|^alpha and queries the other way, for caches of keys in
    few bits (Lin et al. 2024, QServe, arXiv 2405.04532). Which layer feeds which is known for common families, or said in
    `feeds`.
    """
    asker = Node(label, where)
    of = {"alpha": (alpha, ("fixed",)), "steps": (steps, ("adaptive", "grid")), "floor": (floor, ("adaptive",))}
    for key, (value, kinds) in of.items():
        if value is not None and kind not in kinds and not (key == "alpha" and at and KEYS in at):
            raise asker.refuse(f"`{key}` does not go with kind {kind}", hint=f"it belongs to {' and '.join(kinds)}", key=key)
    if feeds and at:
        raise asker.refuse("`feeds` names the layers already", key="at")
    if kind != "fixed" and weight_bits == activation_bits == 16:
        raise asker.refuse("with nothing quantised there is nothing to choose scales for", key="weight_bits")
    if group is not None and weight_bits == 16:
        raise asker.refuse("`group` is of quantised weights", key="group")
    only = [at] if isinstance(at, str) else at or WHERE
    how = How(kind, Bits(weight_bits, activation_bits, group), 0.5 if alpha is None else float(alpha), steps,
              0.1 if floor is None else float(floor), exact)  # fmt: skip
    return SmoothNode(inputs[0], inputs[1], label, where, how=how, only=only, feeds=feeds or {})
