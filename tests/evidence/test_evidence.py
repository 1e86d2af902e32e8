"""The reproductions: that verdicts are what seeds say, that the page is what scripts claim, and the fastest of them, run."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (pip install '.[demo]')")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from evidence import nf4, progressive, task_arithmetic, wise  # noqa: E402
from evidence.claims import Claim, Figures, Named, Verdict, here, verdict  # noqa: E402
from evidence.page import page  # noqa: E402
from evidence.run import load, names  # noqa: E402
from rig.characters import Characters, sources  # noqa: E402
from rig.digits import DOMAINS, Digits  # noqa: E402

import surgery  # noqa: E402

CLAIM = Claim("More is better.", "1 → 2", "{a} to {b:1}, {c:e}", "b > a", lambda f: f.b > f.a)


def seeds(*pairs: tuple[float, float]) -> list[Figures]:
    return [{"a": a, "b": b, "c": 1e-7} for a, b in pairs]


def test_a_claim_reproduces_only_if_it_holds_in_every_seed() -> None:
    assert verdict(CLAIM, seeds((1, 2), (3, 4))).reproduces == "yes"
    assert verdict(CLAIM, seeds((1, 2), (3, 2))) == Verdict(1, 2)
    assert Verdict(1, 2).reproduces == "in 1 of 2"
    assert verdict(CLAIM, seeds((2, 1), (3, 2))).reproduces == "no"


def test_figures_are_means_and_deviations() -> None:
    assert here(CLAIM, seeds((0.25, 10), (0.75, 14))) == ".500 ± .354 to 12.0 ± 2.8, 1.0e-07"
    assert here(CLAIM, seeds((-0.5, 10))) == "-.500 to 10.0, 1.0e-07"


def test_what_fails_is_shown_as_failing() -> None:
    shown: Any = SimpleNamespace(TITLE="T", SOURCE="S.", RIG="digits", CLAIMS=[CLAIM])
    failing = page({"x": shown}, {"x": seeds((2, 1))})
    assert "| T | More is better. | no |" in failing and "Of 1 claims 0 reproduce" in failing
    holding = page({"x": shown}, {"x": seeds((1, 2))})
    assert "What does not reproduce" not in holding and "Of 1 claims 1 reproduce" in holding


def test_the_page_says_what_the_scripts_claim() -> None:
    text = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    parts = re.split(r"(?m)^## ", text)
    sections = {found.group(1): s for s in parts if (found := re.search(r"Script: `examples/evidence/(\w+)\.py`", s))}
    assert len(sections) >= 9 and set(sections) <= set(names())
    failing: set[str] = set()
    for name, section in sections.items():
        rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| claim")]
        claims = load(name).CLAIMS
        assert len(rows) == len(claims), name
        for row, claim in zip(rows, claims, strict=True):
            cells = [c.replace("\\|", "|").strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]]
            assert (cells[0], cells[1], cells[3]) == (claim.says, claim.paper or "–", claim.test), name
            failing |= set() if cells[4] == "yes" else {claim.says}
    summary = next(p for p in parts if p.startswith("What does not reproduce here"))
    assert failing == {
        line.split(" | ")[1] for line in summary.splitlines() if line.startswith("| ") and "claim" not in line[:9]
    }


def test_a_page_of_unequal_seeds_says_how_many_each_has() -> None:
    shown: Any = SimpleNamespace(TITLE="T", SOURCE="S.", RIG="digits", CLAIMS=[CLAIM])
    told = page({"x": shown, "y": shown}, {"x": seeds((1, 2)), "y": seeds((1, 2), (1, 2), (2, 3))})
    assert "over 1 to 3 seeds, as each section says" in told
    assert "printing is one of `--so-far`" in told
    assert "--so-far" not in page({"y": shown}, {"y": seeds((1, 2), (1, 2), (2, 3))})
    assert "x.py`. Seeds: 1." in told and "y.py`. Seeds: 3." in told


def test_every_script_is_whole() -> None:
    for name in names():
        found = load(name)
        assert found.CLAIMS and found.TITLE and found.SOURCE.endswith("."), name
        assert len({c.says for c in found.CLAIMS}) == len(found.CLAIMS), name


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Digits]:
    yield Digits(tmp_path_factory.mktemp("rig"), 1)


@pytest.mark.parametrize("module", [task_arithmetic, wise, nf4, progressive], ids=lambda m: m.__name__.rpartition(".")[2])
def test_claims_hold_on_one_seed(rig: Digits, module: Any) -> None:
    found = module.measure(rig if module.RIG else 1)
    for claim in module.CLAIMS:
        assert claim.holds(Named(found)), (claim.says, here(claim, [found]))


def test_characters_are_read_and_measured_by_the_tools_own_tasks(tmp_path: Path) -> None:
    """A short run: the splits share no text, the loss falls on what is trained, and bits per character are what torch gives."""
    rig = Characters(tmp_path, 1)
    counts = [len(rig.texts("xml", s)) for s in ("train", "validation", "test")]
    assert counts[1:] == [60, 100] and sum(counts) == len(sources("xml"))  # every text is in one split
    base = rig.pretrained("short", steps=12, sizes={"num_hidden_layers": 1})
    tuned = rig.tuned("xml-short", "xml", start=base, steps=12)
    assert rig.bits(tuned, "xml") < rig.bits(base, "xml") - 0.1
    ids = torch.tensor([r["input_ids"] for r in rig.rows("xml", "test")])
    with torch.no_grad():
        loss = rig.alive(tuned)(input_ids=ids, labels=ids).loss
    assert rig.bits(tuned, "xml") == pytest.approx(float(loss) / math.log(2), rel=1e-4)
    half = surgery.ops.lerp(base, tuned, alpha=0.5)
    assert rig.bits(half, "xml") < rig.bits(base, "xml")


def test_rig_keeps_what_it_made_apart_by_how_it_was_made(rig: Digits) -> None:
    first = rig.tuned("apart-1", "inv", steps=2)
    assert rig.file("apart-1").parent == rig.home
    again = Digits(rig.home.parents[1], 1)
    assert again.home == rig.home
    other = again.tuned("apart-1", "inv", steps=3)
    assert again.file("apart-1") != rig.file("apart-1")
    assert any((first[n].compute() != other[n].compute()).any() for n in first)
    with pytest.raises(ValueError, match="two different models are called apart-1"):
        again.tuned("apart-1", "inv", steps=4)
    assert all((first[n].compute() == rig.base[n].compute()).all() for n in first if n.startswith("head"))


def test_splits_are_disjoint_and_domains_share_labels(rig: Digits) -> None:
    sizes = [len(rig.examples("clean", s)[0]) for s in ("train", "validation", "test")]
    assert sizes == [1000, 300, 497]
    for domain in DOMAINS:
        assert (rig.examples(domain, "test")[1] == rig.examples("clean", "test")[1]).all()
    assert not (rig.examples("clean", "test", 50)[0] == Digits(rig.home.parents[1], 2).examples("clean", "test", 50)[0]).all()
