"""Moving what one base version learnt to another one."""

from __future__ import annotations

from surgery.ops.declare import linear, number, takes


@linear(
    "transfer",
    takes=takes("target_base", "delta", space=("weights", "delta")),
    gives="weights",
    params=[number("weight", 1.0, "How much of the delta; 1 is the published setting.")],
    pads=lambda **_: True,
)
def transfer(count: int, *, weight: float) -> list[float]:
    """Apply the diff vector of a fine-tune of one base to another version of that base.

    Maths:
        out = target_base + weight (fine_tuned_source - source_base)
    Shapes:
        Tensors of one shape. Where the delta has more vocabulary rows than the target, the target's missing rows are zero:
        rows of added tokens come out as the fine-tuned model has them.
    Evidence:
        For: Llama 3.1 with the diff vector of Llama 3.0 Instruct: GSM8K 56.6 -> 79.8, IFEval 36.4 -> 83.3 (Lin et al. 2025).
        A few fine-tuning steps from the result train faster than from the new base. Against: between bases that are not
        linearly connected the result is worse than the target alone.
    Known problems:
        It works only where the two bases are linearly connected: a flat loss on the line between them. Versions that were
        continued from one another are; models trained from different initialisations are not, and the result is then worse
        than the target alone. Evaluate the middle of the line before trusting the result.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Presets:
        Language models: weight 1, as published.
    Example:
        new_chat: {op: transfer, of: [base_v2, chat_v1_delta]}
    References:
        Lin et al. 2025, Efficient model development through fine-tuning transfer, arXiv 2503.20110, equation 1.
    """
    return [1.0, weight]
