"""Averages of whole models: uniform and weighted soups."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.ops.declare import boolean, linear, number, takes


def _check(count: int, *, weight: Sequence[float], normalize: bool) -> str | None:
    if normalize and abs(sum(weight)) < 1e-12 * max(1.0, *(abs(w) for w in weight)):
        return f"the weights {list(weight)} sum to zero: the normalised average does not exist; set normalize: false"
    return None


@linear(
    "average",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    params=[
        number("weight", 1.0, "How much of each model: one number for all, or one per model.", per_input=True),
        boolean("normalize", True, "Divide by the sum of the weights."),
    ],
    check=_check,
)
def average(count: int, *, weight: Sequence[float], normalize: bool) -> list[float]:
    """Average the models, weighted or not.

    Maths:
        out = sum_i w_i x_i / sum_i w_i          (normalize: true)
        out = sum_i w_i x_i                      (normalize: false)
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: the uniform soup of fine-tunes of one pre-trained model beats the best single one in accuracy and under
        distribution shift (Wortsman et al. 2022). Against: for different tasks it dilutes every one: 66.5 % where eight
        single CLIP ViT-B/32 models have 90.3 (FusionBench).
    Known problems:
        Averages of models that do not share a pre-trained ancestor are no models at all.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Presets:
        Language models: equal weights for runs of one task; for different tasks `add` with a weight of its own, 0.4 rather
        than the 0.2 of an average of five (MergeBench).
    Example:
        soup: {op: average, of: [a, b, c], weight: [0.5, 0.3, 0.2]}
    References:
        Wortsman et al. 2022, Model soups, arXiv 2203.05482, section 2.
    """
    total = sum(weight) if normalize else 1.0
    return [w / total for w in weight]
