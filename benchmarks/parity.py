"""Every merge method of mergekit 0.1.5 against ours, tensor by tensor, on the same random float64 inputs.

    python benchmarks/parity.py --peer PEER/bin/python

The peer's `merge_tensors` runs in its own Python; tensors are exchanged as safetensors files in a temporary folder. Ours is put
together from operators as a recipe of the peer's dialect means it. Where the method is deterministic, results must agree to
1e-12 of the largest input. Random masks cannot agree: there, density 1 must, and at lower densities both must keep as many
elements as they should and preserve the L1 norm. Exit status 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery import ops

Tensor = torch.Tensor
TOLERANCE = 1e-12  # of the largest input
SPREADS = 5.0  # standard deviations that a share of kept elements may be off

PEER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from mergekit.merge_methods import merge_tensors

torch.manual_seed(0)
given = load_file(sys.argv[1])
made = {}
for i, job in enumerate(json.loads(open(sys.argv[2]).read())):
    tensors = [given[name] for name in job["inputs"]]
    made[str(i)] = merge_tensors(
        tensors, job["method"], parameters=job["parameters"], base_index=0 if job["base"] else None
    ).contiguous().clone()
save_file(made, sys.argv[3])
"""


@dataclass(frozen=True)
class Case:
    """One merge: the peer's parameters, and ours as a function of the inputs (the base first where there is one).

    share: compare shares of kept elements and L1 norms instead of elements; the share to expect. tolerance: where the peer
    rounds to float32 on its way, and why is in `note`.
    """

    parameters: dict[str, Any]
    ours: Callable[..., Tensor]
    count: int = 4
    base: bool = True
    inputs: str = "x"
    share: float | None = None
    tolerance: float = TOLERANCE
    note: str = ""


@dataclass
class Row:
    """One method: how far apart the two are, relative to the largest input, and what was compared."""

    method: str
    difference: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_inputs() -> dict[str, list[Tensor]]:
    """Groups of inputs by name, the base first: a matrix, a vector, sparse and small deltas."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, vector = normal(64, 96), normal(257)
    common = normal(64, 96)
    return {
        "x": [base, *(base + 0.3 * (normal(64, 96) + common) for _ in range(3))],
        "v": [vector, *(vector + 0.3 * normal(257) for _ in range(3))],
        "sparse": [base, *(base + normal(64, 96) * (normal(64, 96) > 0.8) for _ in range(3))],
        "tiny": [base, *(base + 1e-6 * normal(64, 96) for _ in range(3))],
        "small": [base, *(base + 1e-4 * normal(64, 96) for _ in range(3))],
        "large": [normal(300, 400), *(normal(300, 400) for _ in range(1))],
    }


def deltas(base: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    return [ops.diff(x, base) for x in others]


def linear_deltas(weight: Sequence[float], scale: float, normalize: bool) -> Callable[..., Tensor]:
    """base + scale * sum_i w_i delta_i [/ sum_i w_i]."""

    def ours(base: Tensor, *sparse: Tensor) -> Tensor:
        factor = scale / sum(weight) if normalize else scale
        return ops.add(base, *sparse, weight=[w * factor for w in weight])

    return ours


def elected(weight: Sequence[float], scale: float, normalize: bool, **params: Any) -> Callable[..., Tensor]:
    """base + scale * (what agrees with the elected sign)."""

    def ours(base: Tensor, *sparse: Tensor) -> Tensor:
        task = ops.ties(*sparse, **{"density": 1.0, **params}, weight=list(weight), normalize=normalize, like="mergekit")
        return ops.add(base, task, weight=scale)

    return ours


def sparsified(sparsify: Callable[..., Tensor], combine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each delta by itself, then together; `sparsify(delta, i)` for the i-th."""

    def ours(base: Tensor, *others: Tensor) -> Tensor:
        return combine(base, *(sparsify(d, i) for i, d in enumerate(deltas(base, others))))

    return ours


def whole(delta: Tensor, i: int) -> Tensor:
    return delta


def on_deltas(combine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """base + combine(deltas)."""
    return lambda base, *others: ops.add(base, combine(*deltas(base, others)))


def without_base(combine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *models: combine(*models)


W = [0.7, 0.2, 0.4]
TASK = {"weight": W, "lambda": 0.8}
NUSLERP = {"weight": [0.3, 0.5]}


def _spherical() -> dict[str, list[Case]]:
    def nuslerp(**ours: Any) -> Callable[..., Tensor]:
        return lambda a, b: ops.nuslerp(a, b, weight=[0.3, 0.5], **ours)

    def columns(a: Tensor, b: Tensor) -> Tensor:
        return ops.nuslerp_columns(a, b, weight=[0.3, 0.5])

    forms: list[tuple[dict[str, Any], Callable[..., Tensor]]] = [
        ({}, nuslerp()),
        ({"nuslerp_flatten": False}, nuslerp(flatten=False)),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, columns),
    ]
    return {
        "slerp": [Case({"t": t}, lambda a, b, t=t: ops.slerp(a, b, t=t), 2) for t in (0.0, 0.3, 1.0)],
        "nuslerp": [
            case
            for group in "xv"
            for params, ours in forms
            for case in (
                Case({**NUSLERP, **params}, ours, 2, base=False, inputs=group),
                Case({**NUSLERP, **params}, on_deltas(ours), 3, inputs=group),
            )
        ],
        "multislerp": [
            Case({"weight": [0.5, 0.2, 0.4, 0.1]}, lambda *m: ops.multislerp(*m, weight=[0.5, 0.2, 0.4, 0.1]), base=False),
            Case({"weight": W}, on_deltas(lambda *d: ops.multislerp(*d, weight=W))),
            Case(
                {"weight": W, "normalize_weights": False},
                on_deltas(lambda *d: ops.multislerp(*d, weight=W, normalize=False)),
            ),
        ],
        "karcher": [
            Case({}, without_base(ops.karcher), base=False),
            Case({}, without_base(ops.karcher), base=False, inputs="v"),
            Case({"max_iter": 3, "tol": 1e-9}, lambda *m: ops.karcher(*m, max_iter=3, tol=1e-9), base=False),
        ],
    }


def _task_arithmetic() -> dict[str, list[Case]]:
    def crumbs(delta: Tensor, i: int) -> Tensor:
        return ops.breadcrumbs(delta, density=[0.4, 0.9, 0.995][i], gamma=0.02)

    def random_l1(op: Any, **params: Any) -> Callable[..., Tensor]:
        return lambda delta, i: op(delta, rescale="l1", seed=i, **params)

    crumb = {"density": [0.4, 0.9, 0.995], "gamma": 0.02, "lambda": 0.8, "weight": W}
    alone = {"weight": 1.0, "density": 0.3}
    rows = {
        "linear": [
            Case({"weight": [0.5, *W]}, lambda *m: ops.average(*m, weight=[0.5, *W]), base=False),
            Case({"weight": [0.5, *W], "normalize": False}, lambda *m: ops.average(*m, weight=[0.5, *W], normalize=False)),
        ],
        "task_arithmetic": [
            Case({**TASK, "normalize": n}, sparsified(whole, linear_deltas(W, 0.8, n))) for n in (False, True)
        ],
        "ties": [
            Case(
                {**TASK, "density": [0.5, 0.2, 1.0], "normalize": n},
                sparsified(whole, elected(W, 0.8, n, density=[0.5, 0.2, 1.0])),
            )
            for n in (False, True)
        ],
        "breadcrumbs": [Case(crumb, sparsified(crumbs, linear_deltas(W, 0.8, False)))],
        "breadcrumbs_ties": [Case(crumb, sparsified(crumbs, elected(W, 0.8, False)))],
    }
    for name, op, more, normalize in (
        ("dare_linear", ops.dare, {}, False),
        ("dare_ties", ops.dare, {}, False),
        ("della_linear", ops.della, {"epsilon": 0.1}, False),
        ("della", ops.della, {"epsilon": 0.1}, True),
    ):
        combine = elected if name in ("dare_ties", "della") else linear_deltas
        rows[name] = [
            Case({**TASK, "density": 1.0}, sparsified(random_l1(op, density=1.0, **more), combine(W, 0.8, normalize))),
            Case(
                {**alone, **more},
                sparsified(random_l1(op, density=0.3, **more), combine([1.0], 1.0, normalize)),
                2,
                inputs="large",
                share=0.3,
            ),
        ]
    return rows


def _others() -> dict[str, list[Case]]:
    def stock(granularity: str) -> Callable[..., Tensor]:
        return lambda *m: ops.stock(*m, granularity=granularity, clamp=False)

    return {
        "sce": [
            Case({"select_topk": k}, on_deltas(lambda *d, k=k: ops.sce(*d, topk=k, like="mergekit")), inputs=group)
            for k in (1.0, 0.4, 0.0)
            for group in ("x", "sparse", "small")
        ],
        "ram": [Case({}, on_deltas(ops.ram), inputs=g) for g in ("x", "sparse")],
        "ramplus_tl": [
            Case(
                {"r": 0.3, "alpha": alpha},
                on_deltas(lambda *d, alpha=alpha: ops.ramplus(*d, r=0.3, alpha=alpha)),
                inputs=g,
                tolerance=1e-6,
                note="within 1e-6: the peer computes lambda in float32",
            )
            for g in ("x", "sparse")
            for alpha in (0.6, 100.0)
        ],
        "model_stock": [
            Case({}, stock("tensor")),
            Case({"filter_wise": True}, stock("row")),
            Case({"filter_wise": True}, stock("row"), inputs="v"),
        ],
        "nearswap": [
            Case({"t": t}, lambda b, x, t=t: ops.nearswap(b, x, t=t), 2, inputs=g)
            for t in (0.05, 1e-7, 0.0)
            for g in ("x", "tiny")
        ],
        "arcee_fusion": [Case({}, without_base(ops.arcee_fusion), 2, inputs=g) for g in ("x", "v")],
        "passthrough": [
            Case({}, without_base(ops.pass_), 1, base=False),
            Case({"scale": 0.5}, lambda x: ops.scale(x, by=0.5), 1, base=False),
        ],
    }


def cases() -> dict[str, list[Case]]:
    """All methods of the peer, by name."""
    return dict(sorted({**_spherical(), **_task_arithmetic(), **_others()}.items()))


def ask_peer(python: str, groups: dict[str, list[Tensor]], wanted: Sequence[tuple[str, Case]]) -> list[Tensor]:
    """The peer's results, in order. Raises RuntimeError with its last words if it fails."""
    jobs = [
        {
            "method": method,
            "inputs": [f"{case.inputs}.{i}" for i in range(case.count)],
            "base": case.base,
            "parameters": case.parameters,
        }
        for method, case in wanted
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, spec, made = (Path(folder) / n for n in ("in.safetensors", "jobs.json", "out.safetensors"))
        save_file({f"{g}.{i}": x.clone() for g, xs in groups.items() for i, x in enumerate(xs)}, given)
        spec.write_text(json.dumps(jobs))
        done = subprocess.run(
            [python, "-c", PEER, str(given), str(spec), str(made)], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"the peer failed:\n{done.stderr[-2000:]}")
        results = load_file(made)
    return [results[str(i)] for i in range(len(jobs))]


def compare(row: Row, case: Case, inputs: Sequence[Tensor], theirs: Tensor, mine: Tensor) -> None:
    """Take one case into its row."""
    if case.share is not None:
        _compare_random(row, case.share, inputs, theirs, mine)
        return
    top = max(float(x.abs().max()) for x in inputs)
    difference = float((mine - theirs.double()).abs().max()) / top
    row.difference = max(row.difference, difference)
    if case.note and case.note not in row.notes:
        row.notes.append(case.note)
    if mine.shape != theirs.shape or not difference <= case.tolerance:
        row.problems.append(f"{json.dumps(case.parameters)} on {case.inputs}: {difference:.1e}")


def _compare_random(row: Row, share: float, inputs: Sequence[Tensor], theirs: Tensor, mine: Tensor) -> None:
    base, other = inputs
    delta = (other - base).abs()
    rates = []
    for who, result in (("ours", mine), ("the peer's", theirs.double())):
        left = (result - base).abs()
        kept = int((left > 0).sum())
        rates.append(kept / base.numel())
        if abs(kept - share * base.numel()) > SPREADS * math.sqrt(base.numel() * share * (1 - share)):
            row.problems.append(f"{who} keeps {rates[-1]:.4f}, not {share}")
        if abs(float(left.sum() / delta.sum()) - 1.0) > 1e-6:
            row.problems.append(f"{who} L1 norm is {float(left.sum() / delta.sum()):.6f} of what it was")
        if row.method.startswith("della"):
            _compare_ranks(row, who, delta, left > 0, share, 0.1)
    row.notes.append(f"kept {rates[0]:.4f} and {rates[1]:.4f} of {share}; L1 norm preserved by both")


def _compare_ranks(row: Row, who: str, delta: Tensor, kept: Tensor, share: float, epsilon: float) -> None:
    """By tenths of the rank within a row, as many are kept as should be."""
    ranks = delta.argsort(dim=1).argsort(dim=1).double() / (delta.shape[1] - 1)
    for tenth in range(10):
        here = (ranks >= tenth / 10) & (ranks < (tenth + 1) / 10)
        wanted = float((share - epsilon + 2 * epsilon * ranks[here]).mean())
        found = float(kept[here].double().mean())
        if abs(found - wanted) > SPREADS * math.sqrt(wanted * (1 - wanted) / int(here.sum())):
            row.problems.append(f"{who} keeps {found:.3f} of ranks in tenth {tenth}, not {wanted:.3f}")


def race(python: str) -> list[Row]:
    """One row per method."""
    groups, table = make_inputs(), cases()
    wanted = [(method, case) for method, many in table.items() for case in many]
    theirs = ask_peer(python, groups, wanted)
    rows = {method: Row(method) for method in table}
    for (method, case), result in zip(wanted, theirs, strict=True):
        inputs = groups[case.inputs][: case.count]
        compare(rows[method], case, inputs, result, case.ours(*inputs))
    for method, many in table.items():
        rows[method].notes.insert(0, f"{len(many)} case{'s' if len(many) > 1 else ''}")
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="the Python that has mergekit 0.1.5")
    rows = race(parser.parse_args().peer)
    print("| method           | difference | verdict | what was compared |")
    print("| ---------------- | ---------: | ------- | ----------------- |")
    for row in rows:
        verdict = "OFF" if row.problems else "ok"
        print(f"| {row.method:16} | {row.difference:10.1e} | {verdict:7} | {'; '.join([*row.notes, *row.problems])} |")
    failed = sum(bool(row.problems) for row in rows)
    print(f"\n{len(rows)} methods, {failed} off")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
