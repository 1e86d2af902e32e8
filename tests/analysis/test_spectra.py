"""`surgery diff --spectral` against numpy's SVD of float64 matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import BF16, llama_config, llama_tensors, read_checkpoint, surgery, write_checkpoint

from surgery.analysis.spectra import POINTS, Settings, joined, spectral
from surgery.cli.diff_ import command
from surgery.errors import Refused

HIDDEN = 24


def spread(x: np.ndarray) -> np.ndarray:
    """A direction as far as can be from every left singular vector of x."""
    u = np.linalg.svd(x.astype(np.float64))[0]
    return u @ np.where(np.arange(len(u)) % 2, 1.0, -1.0)


def svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vh = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    keep = int((s > 2.0**-23 * math.sqrt(max(x.shape)) * s[0]).sum()) if s.size else 0
    return u[:, :keep], s[:keep], vh[:keep].T


def expected(a: np.ndarray, b: np.ndarray, k: int = 10, eps: float = 0.5) -> dict[str, Any]:
    """Every number from its definition."""
    k = min(k, *a.shape)
    (ua, sa, va), (ub, sb, vb), (ud, sd, vd) = svd(a), svd(b), svd(b.astype(np.float64) - a.astype(np.float64))
    p = sd / sd.sum()
    energy = np.cumsum(sd**2)
    cosines = [np.abs(ua.T @ ub[:, j]).max() for j in range(min(k, len(sb)))]

    def overlap(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x[:, :k], y[:, :k]
        return float(np.linalg.norm(x.T @ y) ** 2 / min(x.shape[1], y.shape[1]))

    curve = np.zeros(min(a.shape))
    curve[: len(sd)] = sd / sd[0]
    return {
        "matrices": 1,
        "rank": len(sd),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "stable_rank": energy[-1] / sd[0] ** 2,
        "rank_90": int(np.argmax(energy >= 0.9 * energy[-1])) + 1,
        "singular_values": list(sd[:10]),
        "spectrum": list(curve[np.linspace(0, len(curve) - 1, POINTS).round().astype(int)]),
        "base_singular_values": list(sa[:10]),
        "tuned_singular_values": list(sb[:10]),
        "intruders": sum(c < eps for c in cosines),
        "directions": len(cosines),
        "intruder_cosines": cosines,
        "overlap_out": overlap(ub, ua),
        "overlap_in": overlap(vb, va),
        "inherited_out": overlap(ud, ua),
        "inherited_in": overlap(vd, va),
        "chance_out": min(k, len(sa)) / a.shape[0],
        "chance_in": min(k, len(sa)) / a.shape[1],
    }


def agree(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-9), key


def pair(shape: tuple[int, int], rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    change = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return a, a + 3.0 * change


@pytest.mark.parametrize("precision", [2.0**-23, 2.0**-52])
@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30), (12, 200), (200, 12), (5, 4)], ids=str)
@pytest.mark.parametrize(("rank", "k", "eps"), [(2, 10, 0.5), (500, 10, 0.9), (1, 3, 0.5)])
def test_a_matrix(shape: tuple[int, int], rank: int, k: int, eps: float, precision: float) -> None:
    a, b = pair(shape, min(rank, *shape))
    found = spectral(torch.from_numpy(a), torch.from_numpy(b), Settings(k, eps), precision=precision)
    wanted = expected(a, b, k, eps)
    if precision < 1e-10:  # then singular values that rounding left count as well
        wanted |= {"rank": found.rank, "spectrum": list(found.curve), "singular_values": list(found.values)}
        wanted |= {"inherited_out": found.inherited[0], "inherited_in": found.inherited[1]} if rank < k else {}
    agree(found.as_dict(), wanted)


def test_what_is_known_of_a_rank_one_change() -> None:
    a = np.diag(np.arange(12, 0, -1.0))
    b = a.copy()
    b[11, 11] = 0.0
    b[:, 0] += 0.0
    b[0, 11] = 100.0  # the new leading direction is e_0, which A has
    found = spectral(torch.from_numpy(a), torch.from_numpy(b), Settings(k=1), precision=2.0**-23)
    assert found.intruders == 0 and found.cosines[0] == pytest.approx(1.0, abs=1e-2)
    spread = np.ones((12, 1)) / math.sqrt(12)
    b = a + 1000 * spread @ np.eye(12)[:1]
    found = spectral(torch.from_numpy(a), torch.from_numpy(b), Settings(k=1), precision=2.0**-23)
    assert found.intruders == 1 and found.cosines[0] == pytest.approx(1 / math.sqrt(12), rel=0.05)
    assert (found.rank, found.rank90) == (1, 1) and found.effective == pytest.approx(1.0) and found.stable == pytest.approx(1.0)


def test_equal_and_empty_directions() -> None:
    a = torch.from_numpy(pair((9, 7), 1)[0])
    same = spectral(a, a.clone(), Settings(), precision=2.0**-23)
    assert (same.rank, same.effective, same.stable, same.rank90, same.values) == (0, 0.0, 0.0, 0, ())
    assert same.intruders == 0 and same.overlap == pytest.approx((1.0, 1.0)) and same.inherited == (0.0, 0.0)
    zeros = torch.zeros_like(a)
    new = spectral(zeros, a, Settings(), precision=2.0**-23)
    assert new.intruders == new.looked == 7 and new.cosines == (0.0,) * 7 and new.overlap == (0.0, 0.0)
    gone = spectral(a, zeros, Settings(), precision=2.0**-23)
    assert gone.looked == 0 and gone.intruders == 0 and gone.rank == 7
    all_plain = json.dumps([x.as_dict() for x in (same, new, gone)], allow_nan=False)
    assert "null" not in all_plain
    equal = spectral(torch.eye(6, dtype=torch.float64), 2 * torch.eye(6, dtype=torch.float64), Settings(), precision=2.0**-23)
    assert equal.effective == pytest.approx(6) and equal.stable == pytest.approx(6) and equal.rank90 == 6
    assert joined([same, new, gone], (3, 9, 7)).intruders == 7


# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = llama_tensors(0, hidden=HIDDEN, vocab=30)
    rng = np.random.default_rng(5)
    tuned = {n: (x.astype(np.float32) + 0.05 * rng.standard_normal(x.shape)).astype(BF16) for n, x in base.items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned[name] = (base[name].astype(np.float32) + 8 * np.outer(spread(base[name]), rng.standard_normal(HIDDEN))).astype(BF16)
    for label, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / label, tensors, config=llama_config(hidden=HIDDEN, vocab=30), shards=2)
    return tmp_path


def call(folder: Path, *args: Any, a: str = "base", b: str = "tuned") -> str:
    done = CliRunner().invoke(command, [str(folder / a), str(folder / b), *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_json_of_checkpoints(models: Path) -> None:
    found = json.loads(call(models, "--spectral", "--json"))
    plain = json.loads(call(models, "--json"))
    base, tuned = read_checkpoint(models / "base"), read_checkpoint(models / "tuned")
    matrices = {n for n, x in base.items() if x.ndim == 2}
    wanted = {n: expected(base[n], tuned[n]) for n in matrices}
    for t in found["tensors"]:
        if t["name"] in matrices:
            agree(t["spectral"], wanted[t["name"]], 1e-5)
        else:
            assert t["spectral"] is None
        t.pop("spectral")
    assert found["tensors"] == plain["tensors"] and found["total"] == plain["total"]
    assert {s["name"] for s in found["spectral"]["skipped"]} == base.keys() - matrices
    for layer in found["layers"]:
        inside = [wanted[n] for n in matrices if n.startswith(layer["layer"] + ".")]
        if not inside:
            assert layer["spectral"] is None
            continue
        assert layer["spectral"]["intruders"] == sum(w["intruders"] for w in inside)
        assert layer["spectral"]["effective_rank"] == pytest.approx(np.mean([w["effective_rank"] for w in inside]), rel=1e-5)
        assert layer["spectral"]["overlap_out"] == pytest.approx(np.mean([w["overlap_out"] for w in inside]), rel=1e-5)
    assert found["spectral"]["total"]["intruders"] == sum(w["intruders"] for w in wanted.values()) >= 1
    assert (found["spectral"]["k"], found["spectral"]["eps"]) == (10, 0.5)


def test_threads_do_not_matter(models: Path) -> None:
    assert call(models, "--spectral", "--json", "--threads", 1) == call(models, "--spectral", "--json", "--threads", 3)


def test_text_and_choices(models: Path) -> None:
    text = call(models, "--spectral", "--tensors", 2)
    assert "8 matrices by singular values, k=10, eps=0.5; 4 other tensors left out" in text
    head, tail = text.split("most intruders")
    assert "model.layers.1.self_attn.q_proj.weight" in tail and "effective" in head
    only = call(models, "--spectral", "--only", "*q_proj*", "-k", 2, "--eps", 0.0)
    assert "3 matrices by singular values, k=2, eps=0" in only and "most intruders" not in only and "0 of 2" in only
    found = json.loads(call(models, "--spectral", "--only", "*.1.*q_proj*", "-k", 3, "--eps", 0.99, "--json"))
    kept = [t for t in found["tensors"] if t["spectral"]]
    assert [t["name"] for t in kept] == ["model.layers.1.self_attn.q_proj.weight"] and kept[0]["spectral"]["directions"] == 3
    assert "by singular values" not in call(models)


def test_stacks_of_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 20, 16)).astype(np.float32)
    b = (a + rng.standard_normal((3, 20, 16))).astype(np.float32)
    for label, x in (("base", a), ("tuned", b)):
        write_checkpoint(tmp_path / label, {"experts": x})
    (found,) = json.loads(call(tmp_path, "--spectral", "--json"))["tensors"]
    parts = [expected(a[e], b[e]) for e in range(3)]
    spectral = found["spectral"]
    assert spectral["matrices"] == 3 and spectral["intruders"] == sum(p["intruders"] for p in parts)
    for key in ("effective_rank", "stable_rank", "rank_90", "overlap_in", "inherited_out"):
        assert spectral[key] == pytest.approx(np.mean([p[key] for p in parts]), rel=1e-5)
    assert spectral["singular_values"] == pytest.approx(np.mean([p["singular_values"] for p in parts], axis=0), rel=1e-5)


def test_mixed_types_small_changes_and_float64(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((40, 30))
    b = a + 1e-7 * rng.standard_normal((40, 30))
    write_checkpoint(tmp_path / "base", {"w": a})
    write_checkpoint(tmp_path / "tuned", {"w": b})
    (found,) = json.loads(call(tmp_path, "--spectral", "--json"))["tensors"]
    agree(found["spectral"], expected(a, b), 1e-5)  # of a delta of 1e-7 more than its size is known
    half = a.astype(BF16)
    write_checkpoint(tmp_path / "half", {"w": half})
    (found,) = json.loads(call(tmp_path, "--spectral", "--json", b="half"))["tensors"]
    wanted = expected(a, half.astype(np.float64))
    assert found["spectral"]["effective_rank"] == pytest.approx(wanted["effective_rank"], rel=1e-5)


def test_what_cannot_be_decomposed(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no tensor that both have matches `nonsense`"):
        call(models, "--spectral", "--only", "nonsense")
    with pytest.raises(Refused, match=r"is a matrix among those that match \*norm\*"):
        call(models, "--spectral", "--only", "*norm*")
    with pytest.raises(Refused, match="--only chooses matrices for --spectral"):
        call(models, "--only", "*norm*")
    bad = read_checkpoint(models / "tuned")
    bad = {n: x.copy() for n, x in bad.items()}
    bad["model.layers.2.mlp.up_proj.weight"][1, 2] = np.nan
    bad["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    write_checkpoint(models / "bad", bad)
    found = json.loads(call(models, "--spectral", "--json", b="bad"))
    why = {s["name"]: s["why"] for s in found["spectral"]["skipped"]}
    assert why["model.layers.2.mlp.up_proj.weight"] == "holds NaN or infinities"
    assert why["model.layers.0.mlp.up_proj.weight"] == "shape differs"
    write_checkpoint(tmp_path / "long", {"embed": np.ones((20000, 3), np.float32)})
    with pytest.raises(Refused, match="no tensor that both have is a matrix"):
        call(tmp_path, "--spectral", a="long", b="long")


def test_it_is_a_command(models: Path) -> None:
    done = surgery("diff", models / "base", models / "tuned", "--spectral", "--only", "*q_proj*")
    assert done.returncode == 0 and "most intruders" in done.stdout, done.stderr
