"""Each merge method of the dialect as steps of native recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.recipe.mergekit.job import Input, Job

Lowering = Callable[[Job], str]


def lower(job: Job) -> str:
    """The step that computes the slice."""
    return _LOWERINGS[job.method.name](job)


def _linear(job: Job) -> str:
    inputs = _all(job)
    keys: dict[str, Any] = {"weight": job.each("weight", "average", inputs)}
    if not job.switch("normalize"):
        keys["normalize"] = False
    return job.step("merged", "average", [i.name for i in inputs], **keys)


def _passthrough(job: Job) -> str:
    (only,) = _all(job)
    by = job.value("scale", "scale", "by", of=only)
    if by is None:
        return only.name
    if isinstance(by, dict):
        by = {glob: 1.0 if v is None else v for glob, v in by.items()}
    return only.name if by == 1.0 else job.step("merged", "scale", only.name, by=by)


def _slerp(job: Job) -> str:
    base, other = _pair(job)
    keys: dict[str, Any] = {"t": job.value("t", "slerp")}
    if job.compat:
        keys["like"] = "mergekit"
    else:
        job.draft.note("slerp follows the arc up to a cosine of 0.999999 (mergekit: a straight line from 0.9995)")
    keys |= _missing(job, [base, other])
    return job.step("merged", "slerp", [base.name, other.name], **keys)


def _nuslerp(job: Job) -> str:
    keys: dict[str, Any] = {"weight": job.each("weight", "nuslerp", job.others)}
    if job.compat:
        keys["like"] = "mergekit"
    if job.switch("nuslerp_flatten"):
        return _on_deltas_if_based(job, "nuslerp", keys)
    if job.switch("nuslerp_row_wise"):  # the name notwithstanding, it takes the first axis
        return _on_deltas_if_based(job, "nuslerp_columns", keys)
    return _on_deltas_if_based(job, "nuslerp", keys | {"flatten": False})


def _multislerp(job: Job) -> str:
    if len(job.others) == 1:
        return job.others[0].name
    keys: dict[str, Any] = {"weight": job.each("weight", "multislerp", job.others)}
    if not job.switch("normalize_weights"):
        keys["normalize"] = False
    if (eps := job.value("eps", "multislerp")) != 1e-8:
        keys["eps"] = eps
    return _on_deltas_if_based(job, "multislerp", keys)


def _karcher(job: Job) -> str:
    inputs = _all(job)
    keys = {"max_iter": job.plain("max_iter"), "tol": job.value("tol", "karcher")}
    return job.step("merged", "karcher", [i.name for i in inputs], **keys)


def _stock(job: Job) -> str:
    base = _base(job)
    keys: dict[str, Any] = {"granularity": "row"} if job.switch("filter_wise") else {}
    if job.compat:
        keys["clamp"] = False
    else:
        job.draft.note("model_stock keeps its ratio within 0 and 1 (mergekit: it may leave them)")
    inputs = [base, *job.others]
    keys |= _missing(job, inputs, base_only=True)
    return job.step("merged", "stock", [i.name for i in inputs], **keys)


def _nearswap(job: Job) -> str:
    base, other = _pair(job)
    keys = {"t": job.value("t", "nearswap")} | _missing(job, [base, other], base_only=True)
    return job.step("merged", "nearswap", [base.name, other.name], **keys)


def _arcee_fusion(job: Job) -> str:
    base, other = _pair(job)
    return job.step("merged", "arcee_fusion", [base.name, other.name], **_missing(job, [base, other]))


def _sce(job: Job) -> str:
    topk = job.value("select_topk", "sce", "topk")
    keys = {} if topk == 1.0 else {"topk": topk}
    if job.compat:
        keys["like"] = "mergekit"
    else:
        job.draft.note("sce weights small deltas by their size too (mergekit: equally where mean squares are below 1e-6)")
    return _added(job, "sce", keys)


def _ram(job: Job) -> str:
    return _added(job, "ram", {"epsilon": job.value("epsilon", "ram")})


def _ramplus(job: Job) -> str:
    return _added(job, "ramplus", {name: job.value(name, "ramplus") for name in ("r", "alpha", "epsilon")})


def _family(sparsify: str | None, *, elect: bool) -> Lowering:
    """Task arithmetic on sparsified deltas; elect: only what agrees with the elected sign is added."""

    def lowered(job: Job) -> str:
        base = _base(job)
        if not job.others:
            return base.name
        trims = sparsify == "magnitude" and not job.switch("rescale")  # ties trims by itself, but does not rescale
        deltas = [_sparse(job, None if trims else sparsify, i) for i in job.others]
        weight = job.each("weight", "ties" if elect else "add", job.others)
        normalize = job.switch("normalize")
        factor = job.one("lambda", "add", "weight")
        if elect:
            keys: dict[str, Any] = {}
            keys["density"] = job.each("density", "ties", job.others) if trims else 1.0
            keys["weight"] = weight
            keys |= ({} if normalize else {"normalize": False}) | {"like": "mergekit"}
            merged = job.step("task", "ties", deltas, **keys)
        elif normalize:
            merged = job.step("task", "average", deltas, weight=weight)
        elif factor == 1.0:
            return job.step("merged", "add", [base.name, *deltas], weight=weight)
        else:
            merged = job.step("task", "average", deltas, weight=weight, normalize=False)
        keys = {} if factor == 1.0 else {"weight": factor}
        return job.step("merged", "add", [base.name, merged], **keys)

    return lowered


def _sparse(job: Job, sparsify: str | None, of: Input) -> str:
    """The delta of an input after its own sparsification."""
    delta = job.delta(of)
    if sparsify is None:
        return delta
    op = "breadcrumbs" if sparsify == "magnitude" else sparsify  # without outliers to remove they are the same
    density = job.value("density", op, of=of)
    if density == 1.0:
        return delta
    keys: dict[str, Any] = {"density": density}
    if op == "breadcrumbs":
        keys["gamma"] = job.value("gamma", op, of=of) if sparsify == op else 0.0
        keys |= {"rescale": "l1"} if job.switch("rescale") else {}
    else:
        if op == "della":
            keys["epsilon"] = job.value("epsilon", op, of=of)
        keys |= {"rescale": _rescale(job, op)} | job.seed(of)
    return job.step(delta.removesuffix(job.suffix).removesuffix("_delta") + "_sparse", op, delta, **keys)


def _rescale(job: Job, sparsify: str) -> str:
    if not job.switch("rescale"):
        return "none"
    if job.compat:
        return "l1"
    job.draft.note(f"{sparsify} divides what it keeps by the probability of keeping it (mergekit: restores the L1 norm)")
    return "inverse"


def _on_deltas_if_based(job: Job, op: str, keys: dict[str, Any]) -> str:
    """With a base the operator works on what the models have on top of it."""
    if job.base is None:
        return job.step("merged", op, [i.name for i in job.others], **keys)
    return _added(job, op, keys)


def _added(job: Job, op: str, keys: dict[str, Any]) -> str:
    base = _base(job)
    if not job.others:
        return base.name
    task = job.step("task", op, [job.delta(i) for i in job.others], **keys)
    return job.step("merged", "add", [base.name, task])


def _missing(job: Job, inputs: list[Input], *, base_only: bool = False) -> dict[str, str]:
    """mergekit's rules for a tensor that only some inputs have, where there is one; without a rule the plan refuses."""
    nodes = [job.draft.nodes[i.name] for i in inputs]
    names = {n for node in nodes for n in node.tensors}
    holders: set[frozenset[int]] = set()
    for name in names:
        have = frozenset(
            i for i, node in enumerate(nodes) if name in node.tensors or node.stand_in(name) is not None
        )
        if len(have) < len(nodes):
            holders.add(have)
    if not holders:
        return {}
    if not base_only:
        return {"missing": "keep"} if all(len(h) == 1 for h in holders) else {}
    if all(h == {0} for h in holders):
        return {"missing": "keep"}
    if job.method.name == "model_stock" and all(h != {0} and len(h) < 3 for h in holders):
        return {"missing": "skip"}
    return {}


def _base(job: Job) -> Input:
    assert job.base is not None
    return job.base


def _pair(job: Job) -> tuple[Input, Input]:
    (other,) = job.others
    return _base(job), other


def _all(job: Job) -> list[Input]:
    """The inputs of a method to which the base is one of them: first, because its config goes along."""
    return [*([job.base] if job.base is not None else []), *job.others]


_LOWERINGS: dict[str, Lowering] = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "task_arithmetic": _family(None, elect=False),
    "ties": _family("magnitude", elect=True),
    "dare_ties": _family("dare", elect=True),
    "dare_linear": _family("dare", elect=False),
    "breadcrumbs": _family("breadcrumbs", elect=False),
    "breadcrumbs_ties": _family("breadcrumbs", elect=True),
    "della": _family("della", elect=True),
    "della_linear": _family("della", elect=False),
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": _ramplus,
    "model_stock": _stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
}
