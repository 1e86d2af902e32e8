"""Averaging models with weights that follow from their losses (LM-Cocktail)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.ops.declare import REQUIRED, linear, number, takes


@linear(
    "lm_cocktail",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    params=[
        number("loss", REQUIRED, "Each model's loss on a few examples of the target task, in nats.", per_input=True),
        number("temperature", 5.0, "How gently the weights follow the losses: large means equal.", low=0.0, above=True),
    ],
)
def lm_cocktail(count: int, *, loss: Sequence[float], temperature: float) -> list[float]:
    """Average models, those with a lower loss on the target task more (LM-Cocktail).

    Maths:
        w_i = exp(-loss_i / temperature) / sum_j exp(-loss_j / temperature);   out = sum_i w_i x_i
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: a fine-tuned model mixed with its base and with models of other tasks keeps its own task and regains general
        ability, from five examples (Xiao et al. 2023; Llama-2-7B and BGE embeddings). Against: it is an average: models of
        unrelated tasks dilute each other as there.
    Known problems:
        The losses must be measured on the same examples with the same tokenizer. At the published temperature 5 differences
        below one nat hardly change the weights: it is then nearly the plain average.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size. The losses are measured outside.
    Presets:
        Language models: temperature 5 as published; 0.5 to 1 where losses differ by less than a nat.
    Example:
        merged: {op: lm_cocktail, of: [base, math, code], loss: [2.31, 1.12, 1.87]}
    References:
        Xiao et al. 2023, LM-Cocktail: resilient tuning of language models via model merging, arXiv 2311.13534, equation 2.
    """
    scores = -np.asarray(loss, np.float64) / float(temperature)
    weights = np.exp(scores - scores.max())
    return [float(w) for w in weights / weights.sum()]
