"""Of scripts that take longer than a test may: what they measure with, and the claims that one seed shows in a second."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (pip install '.[demo]')")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from evidence import bits, corda, data_soup, growth, loftq, one_bit, qqq, stitch, straggler  # noqa: E402
from evidence.claims import Named  # noqa: E402
from rig.digits import Digits  # noqa: E402

import surgery  # noqa: E402
from surgery.lab.layers import profile  # noqa: E402


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Digits]:
    yield Digits(tmp_path_factory.mktemp("rig"), 1)


@pytest.fixture(scope="module")
def run(rig: Digits) -> list[surgery.Checkpoint]:
    return [rig.tuned(d) for d in data_soup.TASKS]


def holds(module: Any, says: str, figures: dict[str, Any]) -> bool:
    (claim,) = (c for c in module.CLAIMS if says in c.says)
    return bool(claim.holds(Named(figures)))


def test_one_bit_codebooks() -> None:
    draw = torch.Generator().manual_seed(3)
    found = one_bit.codebooks({n: torch.randn(37, 11, generator=draw) for n in "ab"})
    for says in ("medians", "packed", "levels published"):
        assert holds(one_bit, says, found), (says, found)


def test_loftq_keeps_the_best_of_turns_taken_by_hand() -> None:
    weight = np.random.default_rng(1).standard_t(4, (48, 64)).astype(np.float32)
    turns = loftq.turns(weight, loftq.QUANTISERS[2], 5)
    assert loftq.fitted(weight, loftq.QUANTISERS[2], start="quantise") == pytest.approx(min(turns), abs=1e-6)
    assert min(turns) < loftq.error(weight, "group", {"bits": 2, "scale": "l2"})


def test_integer_programs_are_solved_exactly() -> None:
    """Against every plan there is."""

    class Point:
        def __init__(self, bits: float, error: float) -> None:
            self.bits, self.error = bits, error

    draw = np.random.default_rng(2)
    coded: Any = {n: [Point(b, e) for b, e in zip(bits.GRID, draw.random(len(bits.GRID)), strict=True)] for n in "abc"}
    plans = [p for p in itertools.product(range(len(bits.GRID)), repeat=3)
             if sum(coded[n][i].bits for n, i in zip("abc", p, strict=True)) <= 7.5]  # fmt: skip
    least = min(sum(coded[n][i].error for n, i in zip("abc", p, strict=True)) for p in plans)
    found = bits.program(coded, 2.5, "error")
    assert sum(coded[n][i].bits for n, i in found.items()) <= 7.5
    assert sum(coded[n][i].error for n, i in found.items()) == pytest.approx(least)


def test_hypervolumes() -> None:
    chord = [(1 - a / 10, a / 10) for a in range(11)]
    assert data_soup.hypervolume(chord) == pytest.approx(0.45)
    assert data_soup.hypervolume([*chord[:5], (0.1, 0.1), *chord[5:]]) == pytest.approx(0.45)  # dominated
    assert data_soup.hypervolume([(3, -2), (3, 5), (-1, 5)]) == pytest.approx(1)  # as good as both ends
    assert data_soup.hypervolume([(1, 0), (0.5, 0.25), (0, 1)]) == pytest.approx(0.125)


def test_modules_of_a_stitched_model_are_those_of_their_checkpoints(
    rig: Digits, run: list[surgery.Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holds(stitch, "to the bit", stitch.exact(rig, run))
    monkeypatch.setattr(stitch, "stitched", lambda run, rules: run[0])  # the check can fail
    assert stitch.exact(rig, run)["off"] > 0


def test_picking_modules_never_makes_validation_worse(rig: Digits, run: list[surgery.Checkpoint]) -> None:
    domain = data_soup.TASKS[0]

    def loss(model: Any) -> float:
        return rig.report(model, [domain], split="validation", measures=["nll"])[domain]["nll"]

    rules, best, _ = stitch.pick(run, loss, 1)
    assert best < loss(run[1]) and loss(stitch.stitched(run, rules)) == best


def test_a_base_merged_in_brings_back_what_single_tasks_lost(rig: Digits) -> None:
    found = data_soup.with_base(rig)
    assert holds(data_soup, "averaged with their base", found) and holds(data_soup, "own tasks than the base", found), found


def test_a_harmful_straggler_is_found(rig: Digits, run: list[surgery.Checkpoint]) -> None:
    noisy = straggler.noisy(rig, run[0], 3, 16)
    task = rig.task(data_soup.TASKS[0])
    found = profile(rig.base, noisy, [task], only=["blocks.*"], resident=rig.resident, settings=rig.settings)
    assert straggler.firsts(found[task.name], "blocks.3")[2]
    assert all((noisy[n].compute() == run[0][n].compute()).all() for n in noisy if not n.startswith("blocks.3."))


def test_low_rank_by_context_keeps_accuracy(rig: Digits, run: list[surgery.Checkpoint]) -> None:
    base = rig.base
    nothing = rig._at("nothing", surgery.ops.scale(base, by=0.0).save, base.node.token)
    own, other, plain = (
        corda.cut(rig, nothing, base, 16, data, f"{i}")
        for i, data in enumerate((corda.of_base(rig, "inv"), corda.of_base(rig, "perm"), None))
    )
    kept = [rig.accuracy(m, ["inv"])["inv"] for m in (own, other, plain)]
    assert kept[0] > max(kept[1:]), kept


def test_a_grown_network_is_the_mean_of_its_parts(rig: Digits) -> None:
    first, second = (growth.trained(rig, f"n{i}", {**growth.NARROW, "normed": False}, i, **{**growth.FIRST, "steps": 3})
                     for i in (1, 2))  # fmt: skip
    wide = surgery.steps.grow(first, second, **growth.ROLES)
    assert holds(growth, "zeros off the diagonal", {"off": growth.apart(rig, wide, [first, second])})
    assert growth.apart(rig, surgery.steps.grow(first, first, **growth.ROLES), [first, second]) > 1e-3  # the check can fail


def test_smoothing_moves_outliers_and_no_output(rig: Digits) -> None:
    model = qqq.harder(rig)
    easy = surgery.steps.smooth(model, rig.statistics("inputs", "outliers", qqq.DOMAIN, count=300), steps=20, feeds=qqq.FEEDS)
    found = {"moved": float((qqq.predicted(rig, easy)[0] - qqq.predicted(rig, model)[0]).abs().max()), "exact": 0.0}
    assert holds(qqq, "changes no output", found)
    assert holds(qqq, "outlier channels alone", qqq.scaled(model, easy))
    assert qqq.output_error(rig, easy, 4) < 0.6 * qqq.output_error(rig, model, 4)
