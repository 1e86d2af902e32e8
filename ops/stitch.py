"""Choosing whole tensors from different models by name."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.ops.declare import REQUIRED, Param, linear, takes


@linear(
    "stitch",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    copies=True,
    params=[Param("rules", "rules", REQUIRED, "Name glob -> which input; the first that matches wins.", fixed=True)],
)
def stitch(count: int, *, rules: Mapping[str, int]) -> list[float]:
    """Take each tensor from one of the models.

    Maths:
        out[name] = inputs[rule(name)][name]
    Shapes:
        Whatever the chosen tensors have; bytes are copied.
    Evidence:
        For: swapping the towers, heads or adapters of sibling models is how modular systems are assembled (arXiv 2406.17257).
        Against: the seams: blocks of models that were trained apart expect other inputs, and stacks of them need training to
        be any good.
    Known problems:
        Tensors of models without a common ancestor do not fit together, whatever their shapes say.
    Cost:
        None: stored bytes are handed on; each tensor is read from one input.
    Example:
        hybrid: {op: stitch, of: [vision, chat], rules: {"vision_tower.*": vision, "*": chat}}
    References:
        None: selection by name.
    """
    raise TypeError("stitch chooses tensors by name; it has nothing to compute")
