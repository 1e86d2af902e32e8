"""`surgery lora` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import all_bytes, llama, llama_config, llama_tensors, read_checkpoint, read_file, surgery, tokens, write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "adapter"))
from adapters import dense, pairs, write_adapter


def tuned(folder: Path, *, rank: int = 2, noise: float = 0.0, norms: bool = False) -> Path:
    """The base plus low-rank changes of attention and MLP, a little noise, and new norms."""
    rng = np.random.default_rng(9)
    tensors = llama_tensors(0, dtype=np.float32)
    for name, change in dense(pairs(4, rank=rank)).items():
        tensors[name] = (tensors[name] + change + noise * rng.standard_normal(change.shape)).astype(np.float32)
    if norms:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    return write_checkpoint(folder, tensors, config=llama_config(3, dtype="float32"), vocab=tokens())


def base(folder: Path) -> Path:
    return write_checkpoint(folder, llama_tensors(0, dtype=np.float32), config=llama_config(3, dtype="float32"), vocab=tokens())


def factors(folder: Path) -> dict[str, np.ndarray]:
    """B A of every module of an adapter whose scale is one, from its file alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    stored = read_file(folder / "adapter_model.safetensors")
    made = {}
    for key in stored:
        if key.endswith("lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            a = stored[f"{stem}.lora_A.weight"].astype(float)
            path = stem.removeprefix("base_model.model.")
            assert a.shape[0] == config["rank_pattern"].get(path, config["r"])
            made[f"{path}.weight"] = stored[key].astype(float) @ a
    return made


def test_extract_apply_round_trip(tmp_path: Path) -> None:
    base(tmp_path / "base"), tuned(tmp_path / "tuned", norms=True)
    done = surgery("lora", "extract", "tuned", "--base", "base", "-o", "lora", "--error", 1e-4, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {t["name"]: t for t in json.loads(done.stdout)["tensors"]}
    low = {n: r for n, r in rows.items() if r["kind"] == "low-rank"}
    assert set(low) == set(dense(pairs(4))) and all(r["rank"] == 2 and r["error"] < 1e-4 for r in low.values())
    assert rows["model.norm.weight"]["kind"] == "full" and rows["lm_head.weight"]["kind"] == "unchanged"
    assert "vLLM does not" in done.stderr
    done = surgery("lora", "apply", "base", "lora", "-o", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted, found = read_checkpoint(tmp_path / "tuned"), read_checkpoint(tmp_path / "again")
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)
    assert (tmp_path / "again" / "tokenizer.json").exists() and not (tmp_path / "again" / "adapter_config.json").exists()


def test_the_said_error_is_the_true_one(tmp_path: Path) -> None:
    base(tmp_path / "base"), tuned(tmp_path / "tuned", rank=4, noise=0.1)
    for extra in ((), ("--dtype", "bfloat16")):
        done = surgery("lora", "extract", "tuned", "--base", "base", "-o", "lora", "--rank", 3, "--json", "--overwrite", *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        before, after = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "tuned")
        made = factors(tmp_path / "lora")
        for row in json.loads(done.stdout)["tensors"]:
            if row["kind"] == "low-rank":
                change = after[row["name"]].astype(float) - before[row["name"]].astype(float)
                true = np.linalg.norm(change - made[row["name"]]) / np.linalg.norm(change)
                assert row["error"] == pytest.approx(true, rel=1e-4)


def test_a_budget_is_kept_and_spent_where_it_helps(tmp_path: Path) -> None:
    base(tmp_path / "base"), tuned(tmp_path / "tuned", rank=5, noise=0.02)
    total = {}
    for size in ("8KB", "12KB"):
        done = surgery("lora", "extract", "tuned", "--base", "base", "-o", size, "--size", size, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / size / "adapter_model.safetensors").stat().st_size <= int(size[:-2]) * 1000
        change = {n: t.astype(float) - llama_tensors(0, dtype=np.float32)[n] for n, t in read_checkpoint(tmp_path / "tuned").items()}
        made = factors(tmp_path / size)
        total[size] = sum(np.linalg.norm(change[n] - made.get(n, 0.0)) ** 2 for n in dense(pairs(4)))
    assert total["12KB"] < total["8KB"]
    ranks = {t["name"]: t["rank"] for t in json.loads(done.stdout)["tensors"]}
    assert len(set(ranks.values())) > 1


def test_merge_is_exact_and_again_an_adapter(tmp_path: Path) -> None:
    one, other = pairs(1, rank=2), pairs(2, rank=3)
    write_adapter(tmp_path / "a", one, lora_alpha=4)
    write_adapter(tmp_path / "b", other, use_rslora=True)
    done = surgery("lora", "merge", "a", "b", "-o", "out", "--weight", 1, "--weight", -1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, made = dense(one, 2.0), dense(other, 3**0.5), factors(tmp_path / "out")
    for name in first:
        np.testing.assert_allclose(made[name], first[name] - second[name], atol=2e-6 * np.abs(first[name]).max())
    again = surgery("lora", "merge", "a", "b", "-o", "out2", "--weight", 1, "--weight", -1, "--threads", 1, cwd=tmp_path)
    assert again.returncode == 0
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "out2")
    done = surgery("lora", "merge", "a", "a", "-o", "same", "--weight", 0.5, cwd=tmp_path)
    assert json.loads((tmp_path / "same" / "adapter_config.json").read_text())["r"] == 2  # no more ranks than there are


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
def test_merge_by_another_method(space: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", pairs(1))
    write_adapter(tmp_path / "b", pairs(2, targets=("mlp.up_proj",)))
    done = surgery("lora", "merge", "a", "b", "-o", "out", "--method", "ties", "--set", "density=0.5", "--space", space, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    assert set(factors(tmp_path / "out")) == set(dense(pairs(1)))
    assert all(np.linalg.matrix_rank(m, tol=1e-5) <= 4 for m in factors(tmp_path / "out").values())


def test_apply_several_with_weights_plans_and_resumes(tmp_path: Path) -> None:
    llama(tmp_path / "base", 0)
    write_adapter(tmp_path / "a", pairs(1))
    write_adapter(tmp_path / "b", pairs(2))
    args = ("lora", "apply", "base", "a", "b", "-o", "out", "--weight", 0.5, "--weight", -0.25)
    done = surgery(*args, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "LORA_DELTA base + a" in done.stdout and not (tmp_path / "out").exists()
    assert surgery(*args, cwd=tmp_path).returncode == 0
    found = read_checkpoint(tmp_path / "out")
    for name, tensor in llama_tensors(0).items():
        wanted = tensor.astype(float) + 0.5 * dense(pairs(1)).get(name, 0.0) - 0.25 * dense(pairs(2)).get(name, 0.0)
        np.testing.assert_allclose(found[name].astype(float), wanted, rtol=2**-8, atol=1e-6)
    again = surgery(*args, cwd=tmp_path)
    assert again.returncode == 2 and "already holds something" in again.stderr


def test_inspect(tmp_path: Path) -> None:
    llama(tmp_path / "base", 0)
    write_adapter(tmp_path / "a", pairs(1), lora_alpha=4)
    done = surgery("lora", "inspect", "a", "--base", "base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 modules" in done.stdout and "acme/base" in done.stdout and "scale 2" in done.stdout and "changes 6 tensors" in done.stdout
    data = json.loads(surgery("lora", "inspect", "a", "--json", cwd=tmp_path).stdout)
    assert {t["rank"] for t in data["targets"]} == {2} and data["full"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("extract", "base", "--base", "base", "-o", "out"), "nothing differs"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--energy", "1.5"), "--energy must be in"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--energy", ".9", "--error", ".1"), "exclude each other"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--size", "1KB"), "kept in full take"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--only", "*nope*"), "--only *nope*: no tensor matches"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--only", "*.q_proj.weight"), "changed too"),
        (("extract", "tuned", "--base", "base", "-o", "out", "--only", "*norm.weight"), "no linear layer"),
        (("extract", "tuned", "--base", "small", "-o", "out"), "is [13, 8] in tuned and [13, 4] in small"),
        (("extract", "tuned", "--base", "base", "-o", "base"), "is, holds or lies in the input"),
        (("merge", "base", "-o", "out"), "no adapter there"),
        (("merge", "a", "wide", "-o", "out"), "shapes differ"),
        (("merge", "a", "a", "-o", "out", "--method", "tiess"), "is no operator on deltas"),
        (("merge", "a", "a", "-o", "out", "--weight", "1", "--weight", "2", "--weight", "3"), "3 values for 2"),
        (("apply", "base", "wide", "-o", "out"), "for another base"),
        (("inspect", "base"), "no adapter there"),
        (("inspect", "wide", "--base", "base"), "for another base"),
        (("merge",), "Missing argument"),
    ],
)  # fmt: skip
def test_refused_with_one_line(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    base(tmp_path / "base"), tuned(tmp_path / "tuned", norms=True)
    write_checkpoint(tmp_path / "small", llama_tensors(0, hidden=4), config=llama_config(3, hidden=4))
    write_adapter(tmp_path / "a", pairs(1)), write_adapter(tmp_path / "wide", pairs(1, hidden=16))
    done = surgery("lora", *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_rank_above_every_matrix_is_refused(tmp_path: Path) -> None:
    base(tmp_path / "base")
    tuned(tmp_path / "tuned")
    done = surgery("lora", "extract", tmp_path / "tuned", "--base", tmp_path / "base", "-o", tmp_path / "out", "--rank", "5000")
    assert done.returncode == 2
    assert "--rank 5000: above every matrix; the largest rank is" in done.stderr
    assert not (tmp_path / "out").exists()
