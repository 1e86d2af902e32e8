"""Task arithmetic: deltas (task vectors) and what can be done with them."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.ops.declare import REQUIRED, boolean, linear, number, takes


@linear(
    "diff",
    takes=takes("fine_tuned", "base", space="weights"),
    gives="delta",
    params=[boolean("pad", False, "Where one model has more vocabulary rows, count the other's missing rows as zero.")],
    pads=lambda pad, **_: pad,
)
def diff(count: int, *, pad: bool) -> list[float]:
    """What fine-tuning changed: the delta, or task vector.

    Maths:
        delta = fine_tuned - base
    Shapes:
        Two tensors of one shape -> the same shape. With pad, first axes may differ: missing rows are zero, so that the rows
        of added tokens are the fine-tuned model's in full.
    Evidence:
        For: deltas can be added, negated and combined by analogy (Ilharco et al. 2022). Against: a delta says what changed
        only where the model really comes from that base; between unrelated models it is as large as they are.
    Known problems:
        Half precision eats small updates: a delta of two bfloat16 models is itself rounded to their grid.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Example:
        math_task: {op: diff, of: [math, base]}
    References:
        Ilharco et al. 2022, Editing models with task arithmetic, arXiv 2212.04089, section 2.
    """
    return [1.0, -1.0]


@linear(
    "add",
    takes=takes("base", "deltas…", space=("same", "delta"), at_least=2),
    gives="first",
    params=[
        number("weight", 1.0, "How much of each delta: one number for all, or one per delta.", per_input=True, first_input=1)
    ],
)
def add(count: int, *, weight: Sequence[float]) -> list[float]:
    """Add deltas to a model, or to another delta.

    Maths:
        out = base + sum_i w_i delta_i
    Shapes:
        Tensors of one shape -> the same shape.
    Evidence:
        For: adding eight task vectors keeps most of the single-task accuracy when the weight is chosen on validation data,
        about 0.3 to 0.4 (Ilharco et al. 2022). On large language models it is the method that helps most reliably (arXiv
        2511.21437). Against: without a tuned weight it ruins the model; with size the gap between methods closes (arXiv
        2410.03617), and training on all data together, where that is possible, remains ahead.
    Known problems:
        The best weight falls with the number of deltas; weight 1 on many of them ruins the model.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Presets:
        Language models: weight 0.4 on each of five experts of Llama-3-8B, 0.2 being their average (MergeBench); search 0.2 to
        1 on validation data. One delta: 0.5 to 1.
    Example:
        merged: {op: add, of: [base, math_task, code_task], weight: 0.4}
    References:
        Ilharco et al. 2022, Editing models with task arithmetic, arXiv 2212.04089, section 2.
    """
    return [1.0, *weight]


@linear(
    "scale",
    takes=takes("x", space="same"),
    gives="first",
    params=[number("by", REQUIRED, "The factor; -1 negates.")],
)
def scale(count: int, *, by: float) -> list[float]:
    """Multiply by a number; by -1 a delta becomes what forgets its task.

    Maths:
        out = by x
    Shapes:
        Any tensor -> the same shape.
    Evidence:
        For: subtracting a task vector lowers its task's accuracy and costs a control task little (Ilharco et al. 2022,
        section 3). Against: a task forgotten by negation is learned again in a fraction of the steps, and large factors take
        general ability along.
    Known problems:
        Scaling weights rather than deltas changes what normalisation layers see; it is rarely what is wanted.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Presets:
        Language models: by 0.3 to 1 to weaken a fine-tune; -0.5 to forget one, with the control task watched.
    Example:
        forget: {op: scale, of: toxic_task, by: -1}
    References:
        Ilharco et al. 2022, Editing models with task arithmetic, arXiv 2212.04089, section 3.
    """
    return [by]


@linear("analogy", takes=takes("a", "b", "c", space="delta"), gives="delta")
def analogy(count: int) -> list[float]:
    """A is to B as C is to the result: the delta for a task without data of its own.

    Maths:
        out = delta_c + (delta_b - delta_a)
    Shapes:
        Three tensors of one shape -> the same shape.
    Evidence:
        For: task vectors of three related domains improve the fourth (Ilharco et al. 2022, section 5). Against: shown for
        sentiment and image domains of small models; nothing is published for language models of today's size.
    Known problems:
        Gains are small where the fourth domain has data of its own.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Example:
        target: {op: analogy, of: [yelp_lm, yelp_sentiment, amazon_lm]}
    References:
        Ilharco et al. 2022, Editing models with task arithmetic, arXiv 2212.04089, section 5.
    """
    return [-1.0, 1.0, 1.0]


@linear("pass", takes=takes("x", space="same"), gives="first", copies=True)
def pass_(count: int) -> list[float]:
    """Hand a checkpoint on as it is.

    Maths:
        out = x
    Shapes:
        Any tensor -> the same shape; bytes are copied unless the output has another dtype.
    Evidence:
        None needed: this converts dtype and shard size, or names an input for the output.
    Known problems:
        None.
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Example:
        copy: {op: pass, of: base}
    References:
        None.
    """
    return [1.0]
