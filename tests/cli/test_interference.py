"""`surgery interference` on real files, against the formula in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import BF16, llama_config, llama_tensors, surgery, write_checkpoint

from surgery.cli.interference_ import command
from surgery.errors import Refused

HIDDEN = 24


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and three fine-tunes; two of them learnt the same in block 1."""
    base = llama_tensors(0, hidden=HIDDEN, vocab=30)
    changes = [llama_tensors(i, hidden=HIDDEN, vocab=30, dtype=np.float32) for i in (1, 2, 3)]
    for name in base:
        if ".1." in name:
            changes[1][name] = changes[0][name]
    for label, change in zip(("base", "a", "b", "c"), [None, *changes], strict=True):
        tensors = {n: (x.astype(np.float32) + (0 if change is None else 0.5 * change[n])).astype(BF16) for n, x in base.items()}
        write_checkpoint(tmp_path / label, tensors, config=llama_config(hidden=HIDDEN, vocab=30))
    return tmp_path


def call(folder: Path, *args: Any, of: str = "ab") -> Any:
    done = CliRunner().invoke(command, [str(folder / "base"), *(str(folder / m) for m in of), *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def read(folder: Path, name: str) -> np.ndarray:
    from helpers import read_checkpoint

    return read_checkpoint(folder)[name].astype(np.float64)


def expected(deltas: list[np.ndarray], k: int) -> tuple[float, float]:
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    u = np.hstack([p[0][:, :k] for p in parts])
    v = np.vstack([p[2][:k] for p in parts]).T
    s = np.concatenate([p[1][:k] for p in parts])
    one = np.eye(len(s))
    return np.abs((u.T @ u - one) @ np.diag(s) @ (v.T @ v - one)).sum(), s.sum()


@pytest.mark.parametrize(("of", "options", "k"), [("ab", [], 12), ("abc", [], 8), ("ab", ["--rank", "3"], 3)])
def test_json_holds_the_formula(models: Path, of: str, options: list[str], k: int) -> None:
    found = json.loads(call(models, "--json", *options, of=of))
    assert found["models"] == list(of)
    tensors = {t["name"]: t for t in found["tensors"]}
    assert len(tensors) == 8 and set(found["skipped"]) == {n for n in llama_tensors(0) if n not in tensors}
    for name, mine in tensors.items():
        base = read(models / "base", name)
        score, mass = expected([read(models / m, name) - base for m in of], k)
        assert mine["rank"] == k
        assert (mine["sti"], mine["mass"]) == pytest.approx((score, mass), rel=1e-6)
        assert mine["relative"] == pytest.approx(score / mass, rel=1e-6)
    blocks = [layer for layer in found["layers"] if ".layers." in layer["layer"]]
    assert [b["layer"] for b in blocks] == [f"model.layers.{i}" for i in range(3)]
    for block in blocks:
        inside = [t for t in found["tensors"] if t["name"].startswith(block["layer"] + ".")]
        assert len(inside) == 2 and block["sti"] == pytest.approx(sum(t["sti"] for t in inside))
    assert found["total"]["sti"] == pytest.approx(sum(t["sti"] for t in tensors.values()))
    if of == "ab":
        same = [t for t in found["tensors"] if ".1." in t["name"]]
        assert all(t["overlap_out"] > 0.99 and t["relative"] == pytest.approx(1.0, abs=0.05) for t in same)


def test_text_names_layers_and_matrices(models: Path) -> None:
    text = call(models, "--tensors", "2")
    assert "8 matrices of a, b; 4 other tensors left out" in text
    head, tail = text.split("most interference")
    assert "model.layers.0" in head and head.splitlines()[-2].startswith("all") and len(tail.strip().splitlines()) == 3
    assert "(0.500)" in text  # by chance: 12 of 24 directions
    assert "most interference" not in call(models, "--tensors", "0")
    only = call(models, "--only", "*q_proj*")
    assert "3 matrices" in only and "up_proj" not in only


def test_threads_do_not_matter(models: Path) -> None:
    assert call(models, "--json", "--threads", "1") == call(models, "--json", "--threads", "3")


def test_stacked_experts_are_summed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = [{"experts": rng.normal(size=(4, 20, 16)).astype(np.float32)} for _ in range(3)]
    for label, held in zip(("base", "a", "b"), tensors, strict=True):
        write_checkpoint(tmp_path / label, held)
    (found,) = json.loads(call(tmp_path, "--json"))["tensors"]
    parts = [expected([t["experts"][e].astype(float) - tensors[0]["experts"][e] for t in tensors[1:]], 8) for e in range(4)]
    assert (found["sti"], found["mass"]) == pytest.approx(tuple(np.sum(parts, axis=0)), rel=1e-5)


def test_equal_models_and_no_change(models: Path) -> None:
    found = json.loads(call(models, "--json", "--only", "*up_proj*", of="aa"))["total"]
    assert found["relative"] == pytest.approx(1.0, abs=1e-6)
    write_checkpoint(models / "z", {n: read(models / "base", n).astype(BF16) for n in llama_tensors(0)})
    found = json.loads(call(models, "--json", of="zz"))["total"]
    assert found["sti"] == found["relative"] == found["overlap_in"] == 0.0


def test_what_cannot_be_compared_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="two or more"):
        call(models, of="a")
    with pytest.raises(Refused, match=r"no tensor is a matrix among those that match \*norm\*"):
        call(models, "--only", "*norm*")
    write_checkpoint(models / "wide", llama_tensors(0, hidden=16, vocab=30))
    with pytest.raises(Refused, match="shapes differ"):
        call(models, of=["a", "wide"])
    bad = llama_tensors(5, hidden=HIDDEN, vocab=30)
    bad["model.layers.2.mlp.up_proj.weight"][1, 2] = np.nan
    write_checkpoint(models / "bad", bad)
    with pytest.raises(Refused, match=r"bad: `model.layers.2.mlp.up_proj.weight` holds NaN"):
        call(models, of=["a", "bad"])


def test_it_is_a_command(models: Path) -> None:
    done = surgery("interference", models / "base", models / "a", models / "b", "--only", "*q_proj*")
    assert done.returncode == 0 and "model.layers.0" in done.stdout, done.stderr
    refused = surgery("interference", models / "base", models / "a")
    assert refused.returncode == 2 and "two or more" in refused.stderr and "hint:" in refused.stderr
