"""Ensemble selection by populations of counts, against the formulas in a few lines and merges by hand."""

from __future__ import annotations

import json
from itertools import combinations
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lab_rig import Net, state, write
from torch.nn import functional as F

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Settings
from surgery.lab.population import Between, archive, between, child, crossing, mutated, niches, reduced

FAST = Settings(resamples=50)
NAMES = ("base", "rot90", "inv", "other")
TEXT = f"method: population\nmodels: [{', '.join(NAMES)}]\nobjective: {{rot90: nll, inv: nll}}\ntasks: tasks.yaml\n"


def go(work: Path, resident: lab.Resident, more: str = "", *, out: str = "out", resume: bool = False) -> lab.Sweep:
    (work / "s.yaml").write_text(TEXT + more)
    return lab.sweep(work / "s.yaml", work / out, resident=resident, settings=FAST, resume=resume)


def losses(work: Path, counts: list[int], task: str) -> np.ndarray:
    """Of every validation example, of the average of these models."""
    states = [state(work / n) for n in NAMES]
    model = Net()
    model.load_state_dict({k: sum(c * s[k] for c, s in zip(counts, states, strict=True)) / sum(counts) for k in states[0]})
    data = np.load(work / "data" / f"{task}-validation.npz")
    with torch.inference_mode():
        found = F.cross_entropy(model(torch.from_numpy(data["images"])), torch.from_numpy(data["labels"]), reduction="none")
    return found.double().numpy()


@pytest.mark.parametrize("diversity", [True, False])
def test_a_population_begins_with_single_models_and_stays_with_counts(
    work: Path, resident: lab.Resident, diversity: bool
) -> None:
    made = go(work, resident, f"trials: 24\nseed: 3\ndiversity: {str(diversity).lower()}\n")
    counts = [tuple(t.params["steps.soup.weight"]) for t in made.trials]
    assert len(counts) == 24 == len(set(counts)) and all(gcd(*c) == 1 and min(c) >= 0 for c in counts)
    assert counts[:4] == [tuple(int(i == j) for j in range(4)) for i in range(4)]
    scores = [-float(np.mean([losses(work, list(c), t).mean() for t in ("rot90", "inv")])) for c in counts]
    np.testing.assert_allclose([t.score for t in made.trials], scores, rtol=1e-5)
    first = int(np.argmax(scores[:4]))
    assert counts[4:7] == [tuple(int(j in (first, i)) for j in range(4)) for i in range(4) if i != first]
    assert made.chosen.number == int(np.argmax(scores)) + 1 and max(scores) > max(scores[:4])
    told = json.loads((work / "out" / "results.json").read_text())
    assert ("niches" in told) == diversity
    if diversity:
        _differences(work, told["niches"])
    again = go(work, resident, f"trials: 24\nseed: 3\ndiversity: {str(diversity).lower()}\n", out="again")
    assert [t.params for t in again.trials] == [t.params for t in made.trials]
    other = go(work, resident, f"trials: 24\nseed: 4\ndiversity: {str(diversity).lower()}\n", out="fourth")
    assert [t.params for t in other.trials] != [t.params for t in made.trials]
    assert yaml.safe_load((work / "out" / "best.yaml").read_text())["steps"]["soup"]["weight"] == list(counts[made.chosen.number - 1])


def _differences(work: Path, told: dict) -> None:
    """Distances and correlations that the sweep wrote, against those of the files."""
    flat = [torch.cat([v.double().reshape(-1) for v in state(work / n).values()]).numpy() for n in NAMES]
    distance = np.array([[np.linalg.norm(a - b) for b in flat] for a in flat])
    np.testing.assert_allclose(told["distance"], distance / distance.max(), rtol=1e-6, atol=1e-9)
    seen = [np.concatenate([losses(work, [int(i == j) for j in range(4)], t) for t in ("rot90", "inv")]) for i in range(4)]
    np.testing.assert_allclose(told["correlation"], np.corrcoef(seen), rtol=1e-4, atol=1e-5)
    assert 1 < told["niches"] <= 16


@pytest.mark.parametrize("kept", [2, 5, 11])
def test_a_killed_population_goes_on_as_if_it_had_not_been(
    work: Path, resident: lab.Resident, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(work, resident, "trials: 14\n", out="whole")
    journal = work / "whole" / "trials.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert sum("between" in json.loads(line) for line in lines) == 1
    journal.write_text("".join(lines[:kept]) + lines[kept][:9])
    before = [line for line in lines[:kept] if "params" in json.loads(line)]
    from surgery.lab.images import Images

    seen: list[str] = []
    run = Images.run
    monkeypatch.setattr(Images, "run", lambda self, s, split: seen.append(split) or run(self, s, split))
    made = go(work, resident, "trials: 14\n", out="whole", resume=True)
    assert [(t.params, t.score) for t in made.trials] == [(t.params, t.score) for t in whole.trials]
    measured = 4 if kept == 2 else 0  # single models once more, unless their differences were written down already
    final = 3  # temperatures are fitted for the three tasks of the report at the end
    assert seen.count("validation") == 2 * (14 - len(before) + measured) + final
    assert made.niches == whole.niches


def test_models_that_fail_are_in_no_average(work: Path, resident: lab.Resident) -> None:
    net = Net()
    with torch.no_grad():
        net.embed.weight.fill_(1e38)
    write(net, work / "huge")
    text = TEXT.replace("other]", "huge]") + "trials: 12\n"
    (work / "s.yaml").write_text(text)
    made = lab.sweep(work / "s.yaml", work / "out", resident=resident, settings=FAST)
    counts = [t.params["steps.soup.weight"] for t in made.trials]
    assert made.failed == 1 and made.trials[3].score is None and len(made.trials) == 12
    assert all(c[3] == 0 for c in counts[4:])
    assert np.array(made.niches["distance"])[3].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("archive: 5\n", "must be a square"),
        ("archive: 1\n", "must be a square"),
        ("trials: 3\n", "at least as many as there are models"),
        ("picks: 3\n", "`picks` does not go with method population"),
        ("diversity: 2\n", "`diversity` cannot be 2"),
    ],
)
def test_what_cannot_be_is_refused(work: Path, resident: lab.Resident, more: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        go(work, resident, more)
    assert not (work / "out").exists()


# -- the parts ---------------------------------------------------------------------------------------------------------------


def drawn(count: int = 5) -> Between:
    draw = np.random.default_rng(1)
    flat, seen = draw.normal(size=(count, 30)), draw.normal(size=(count, 50))
    return between(list(seen), lambda: iter([flat[:, :10], flat[:, 10:]]))


def test_behaviour_is_the_mean_over_pairs_of_members() -> None:
    found = drawn()
    draw = np.random.default_rng(2)
    for _ in range(20):
        counts = tuple(int(c) for c in draw.integers(0, 4, 5))
        if sum(c > 0 for c in counts) < 2:
            continue
        pairs = [(i, j) for i, j in combinations(range(5), 2)]
        weight = [counts[i] * counts[j] for i, j in pairs]
        for value, matrix in zip(found.behaviour(counts), (found.distance, found.correlation), strict=True):
            assert value == pytest.approx(sum(w * matrix[i, j] for w, (i, j) in zip(weight, pairs, strict=True)) / sum(weight))
    assert found.behaviour((0, 3, 0, 0, 0)) == (0.0, 1.0)
    same = between([np.ones(4), np.arange(4.0)], lambda: iter([np.ones((2, 3))]))
    assert same.distance.tolist() == [[0, 0], [0, 0]] and same.correlation.tolist() == [[1, 0], [0, 1]]


def test_niches_hold_the_best_of_their_kind() -> None:
    found, draw = drawn(), np.random.default_rng(3)
    scored = {tuple(int(c) for c in draw.integers(0, 4, 5)): float(draw.normal()) for _ in range(60)}
    scored.pop((0,) * 5, None)
    cells = niches(scored, found, 3)
    assert 3 < len(cells) <= 9 and all(0 <= a < 3 and 0 <= b < 3 for a, b in cells)
    behaviours = {c: found.behaviour(c) for c in scored}
    edges = [np.quantile([b[k] for b in behaviours.values()], [1 / 3, 2 / 3]) for k in (0, 1)]
    for counts, score in scored.items():
        cell = tuple(int(sum(behaviours[counts][k] > e for e in edges[k])) for k in (0, 1))
        assert score <= cells[cell][1]
    assert max(scored.values()) == max(s for _, s in cells.values())
    best = archive(scored | {(9, 9, 9, 9, 9): None}, None, 4)
    assert sorted(best.values()) == sorted(scored.values())[-4:] and (9,) * 5 not in best


def test_children_are_new_and_counts_never_negative() -> None:
    draw = np.random.default_rng(4)
    elite = {(1, 0, 0): 0.1, (0, 1, 0): 0.2, (1, 1, 0): 0.5}
    known: dict[tuple[int, ...], float | None] = dict(elite)
    for _ in range(300):
        made = child(draw, elite, known, [0, 1])
        assert made not in known and made[2] == 0 and min(made) >= 0 and gcd(*made) == 1
        known[made] = 0.0
    for _ in range(200):
        counts = mutated(draw, [1, 0, 2], [0, 1, 2])
        assert sum(counts) in (2, 4) and sum(abs(a - b) for a, b in zip(counts, [1, 0, 2], strict=True)) == 1
    assert mutated(draw, [0, 1, 0], [1]) == [0, 2, 0]
    assert {sum(crossing(draw, (1,) * 6, (0,) * 6)) for _ in range(300)} == set(range(7))
    assert reduced([2, 4, 0]) == (1, 2, 0) and reduced([0, 0]) == (0, 0)
