"""`surgery inspect` and `surgery diff` on real files, against numpy in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from surgery.cli.diff_ import command as diff
from surgery.cli.inspect_ import command as inspect
from surgery.errors import Refused

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.int64): "I64"}
NAMES |= {np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(bool): "BOOL"}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 50, "tie_word_embeddings": True}


def write(directory: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint with a safetensors file made by hand, so that any type can be in it."""
    directory.mkdir()
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def model(seed: int, dtype: Any = ml_dtypes.bfloat16) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return rng.normal(0, 0.02, shape).astype(np.float32).astype(dtype)

    made = {"lm_head.bias": draw(50), "model.embed_tokens.weight": draw(50, 16)}
    for i in range(3):
        made[f"model.layers.{i}.self_attn.q_proj.weight"] = draw(16, 16)
        made[f"model.layers.{i}.mlp.up_proj.weight"] = draw(700, 401)  # several pieces
        made[f"model.layers.{i}.norm.weight"] = draw(16)
    made["model.norm.weight"] = draw(16)
    made["model.ids"] = np.arange(7)
    return made


def call(command: Any, *args: Any) -> str:
    done = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def call_json(command: Any, *args: Any) -> Any:
    return json.loads(call(command, *args, "--json"), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def wide(x: Any) -> Any:
    return np.asarray(x).astype(np.float64).ravel()


def expect(found: dict[str, Any], a: Any, b: Any) -> None:
    d = b - a
    assert found["norm"] == pytest.approx(np.linalg.norm(d), rel=1e-5)
    assert found["relative"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(a), rel=1e-5)
    assert found["max_abs"] == pytest.approx(np.abs(d).max(), rel=1e-6)
    assert found["changed"] == np.count_nonzero(d)
    assert found["changed_share"] == pytest.approx(np.count_nonzero(d) / d.size)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-7)


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_reads_headers(tmp_path: Path) -> None:
    tensors = model(0)
    view = call_json(inspect, write(tmp_path / "m", tensors, CONFIG))
    assert view["parameters"] == sum(x.size for x in tensors.values())
    assert view["bytes"] == sum(x.nbytes for x in tensors.values())
    assert view["dtypes"]["bfloat16"]["tensors"] == 12 and view["dtypes"]["int64"]["tensors"] == 1
    (tower,) = view["towers"]
    assert tower["prefix"] == "model.layers" and tower["block_parameters"] == [16 * 16 + 700 * 401 + 16] * 3
    assert view["vocabulary"] == {"model.embed_tokens.weight": 50, "lm_head.bias": 50}
    assert view["tied"]["declared"] is True and view["config"]["model_type"] == "llama"
    assert {t["name"] for t in view["tensors"]} == set(tensors) and not view["scanned"]
    assert view["files"][0]["tensors"] == len(tensors)
    text = call(inspect, tmp_path / "m")
    assert "model.layers.{0-2}.mlp.up_proj.weight" in text and "700×401" in text and "3 blocks" in text


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_scan_agrees_with_numpy(tmp_path: Path, dtype: Any) -> None:
    tensors = model(1, dtype)
    view = call_json(inspect, write(tmp_path / "m", tensors), "--scan")
    for t in view["tensors"]:
        x, found = wide(tensors[t["name"]]), t["scan"]
        assert (found["min"], found["max"]) == (x.min(), x.max())
        assert not found["problems"]
        if t["dtype"] != "int64":
            assert found["rms"] == pytest.approx(np.sqrt(np.mean(x * x)), rel=1e-5)
    assert "no anomalies" in call(inspect, tmp_path / "m", "--scan")


def test_scan_finds_anomalies(tmp_path: Path) -> None:
    tensors = model(2)
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up][[3, 340, 699]] = 0
    tensors[up][5, 7:9] = np.nan
    tensors[up][650, 0] = -np.inf
    tensors["model.norm.weight"][:] = 0
    tensors["long.weight"] = np.zeros((3, 300_000), np.float32)  # rows longer than a piece
    tensors["long.weight"][1, 299_999] = 1e-30
    tensors["none.weight"] = np.full((2, 2), np.nan, np.float32)
    tensors["empty.weight"] = np.zeros((0, 4), np.float32)
    view = call_json(inspect, write(tmp_path / "m", tensors), "--scan")
    scans = {t["name"]: t["scan"] for t in view["tensors"]}
    assert (scans[up]["nan"], scans[up]["inf"], scans[up]["dead_rows"]) == (2, 1, 3)
    assert scans[up]["first_dead_rows"] == [3, 340, 699]
    x = wide(tensors[up])
    x = x[np.isfinite(x)]
    assert (scans[up]["min"], scans[up]["max"]) == (x.min(), x.max())
    assert scans[up]["rms"] == pytest.approx(np.sqrt(np.mean(x * x)), rel=1e-5)
    assert scans["model.norm.weight"]["all_zero"]
    assert scans["long.weight"]["first_dead_rows"] == [0, 2]
    assert scans["long.weight"]["rms"] == pytest.approx(1e-30 / np.sqrt(900_000))
    assert scans["none.weight"]["nan"] == 4 and scans["none.weight"]["rms"] is None
    assert scans["empty.weight"]["problems"] == []
    text = call(inspect, tmp_path / "m", "--scan")
    assert "2 NaN, 1 infinite, 3 of 700 rows all zero (3, 340, 699)" in text and "4 tensors with anomalies" in text


# -- diff ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(ml_dtypes.bfloat16, ml_dtypes.bfloat16), (np.float32, ml_dtypes.bfloat16),
                                    (np.float64, np.float64)])  # fmt: skip
def test_diff_agrees_with_numpy(tmp_path: Path, dtypes: tuple[Any, Any]) -> None:
    a, b = model(3, dtypes[0]), model(4, dtypes[1])
    same = "model.layers.2.mlp.up_proj.weight"
    if dtypes[0] == dtypes[1]:
        b[same] = a[same]
    found = call_json(diff, write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert not found["same"] and not found["only_a"] and not found["only_b"]
    for t in found["tensors"]:
        if t["name"] == "model.ids":
            assert t["equal"] and "norm" not in t
            continue
        expect(t, wide(a[t["name"]]), wide(b[t["name"]]))
    by_layer = {item["layer"]: item for item in found["layers"]}
    for i in range(3):
        inside = [n for n in a if n.startswith(f"model.layers.{i}.")]
        x, y = (np.concatenate([wide(m[n]) for n in inside]) for m in (a, b))
        expect(by_layer[f"model.layers.{i}"], x, y)
    order = [name for name in by_layer if "layers" in name]
    assert order == [f"model.layers.{i}" for i in range(3)]
    assert next(iter(by_layer)) == "model.embed_tokens" and list(by_layer)[-1] != "model.layers.2"
    text = call(diff, tmp_path / "a", tmp_path / "b", "--tensors", "2")
    listed = text.split("most changed tensors")[1].splitlines()[1:]
    assert "model.layers.1 " in text and len(listed) == 2


def test_diff_of_near_twins_keeps_its_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    a = {"w.weight": rng.normal(0, 1, (500, 900)).astype(np.float32)}
    b = {"w.weight": (a["w.weight"] + rng.normal(0, 1e-4, (500, 900))).astype(np.float32)}
    (t,) = call_json(diff, write(tmp_path / "a", a), write(tmp_path / "b", b))["tensors"]
    x, y = wide(a["w.weight"]), wide(b["w.weight"])
    unit = x / np.linalg.norm(x) - y / np.linalg.norm(y)
    assert 1 - t["cosine"] == pytest.approx(unit @ unit / 2, rel=1e-4)
    assert t["norm"] == pytest.approx(np.linalg.norm(y - x), rel=1e-6)


def test_diff_of_extreme_magnitudes(tmp_path: Path) -> None:
    a = {"huge": np.full(9000, 3e38, np.float32), "tiny": np.full(9000, 1e-30, np.float32), "zero": np.zeros(5)}
    b = {"huge": np.full(9000, -3e38, np.float32), "tiny": np.full(9000, 2e-30, np.float32), "zero": np.ones(5)}
    found = call_json(diff, write(tmp_path / "a", a), write(tmp_path / "b", b))
    huge, tiny, zero = found["tensors"]
    assert huge["cosine"] == pytest.approx(-1) and huge["max_abs"] == pytest.approx(6e38)
    assert huge["relative"] == pytest.approx(2) and tiny["relative"] == pytest.approx(1)
    assert tiny["norm"] == pytest.approx(1e-30 * np.sqrt(9000)) and tiny["cosine"] == pytest.approx(1)
    assert zero["relative"] is None and zero["cosine"] is None and zero["norm"] == pytest.approx(np.sqrt(5))


def test_diff_of_nonfinite_values(tmp_path: Path) -> None:
    a = {"w": np.array([1, np.nan, np.inf, 4, np.inf], np.float32)}
    b = {"w": np.array([2, np.nan, np.inf, np.nan, -np.inf], np.float32)}
    (t,) = call_json(diff, write(tmp_path / "a", a), write(tmp_path / "b", b))["tensors"]
    assert (t["nonfinite"], t["changed"], t["norm"]) == (4, 3, 1.0)
    assert "4 elements are NaN or infinite" in call(diff, tmp_path / "a", tmp_path / "b")


def test_diff_says_what_is_not_common(tmp_path: Path) -> None:
    a, b = model(6), model(6)
    del a["model.norm.weight"], b["lm_head.bias"]
    b["model.ids"] = b["model.ids"] + 1
    b["model.embed_tokens.weight"] = np.concatenate([b["model.embed_tokens.weight"]] * 2)
    b["model.layers.0.norm.weight"] = np.zeros(16, np.int64)
    found = call_json(diff, write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert [t["name"] for t in found["only_a"]] == ["lm_head.bias"]
    assert [t["name"] for t in found["only_b"]] == ["model.norm.weight"]
    why = {t["name"]: t["not_compared"] for t in found["tensors"] if t["not_compared"]}
    assert why == {"model.embed_tokens.weight": "shape", "model.layers.0.norm.weight": "dtype"}
    text = call(diff, tmp_path / "a", tmp_path / "b")
    for line in ("only in A: lm_head.bias", "only in B: model.norm.weight", "[50, 16] -> [100, 16]",
                 "bfloat16 -> int64", "1 differ: model.ids"):  # fmt: skip
        assert line in text


def test_diff_of_twins(tmp_path: Path) -> None:
    path = write(tmp_path / "a", model(7))
    assert call_json(diff, path, path)["same"]
    assert "the same: all 13 tensors agree" in call(diff, path, path)


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        call(inspect, tmp_path / "nothing")
    with pytest.raises(Refused, match="no such file"):
        call(diff, write(tmp_path / "a", model(8)), tmp_path / "nothing")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "a", model(9), CONFIG)
    code = (
        "import sys; from click.testing import CliRunner; from surgery.cli import cli\n"
        f"for args in (['--help'], ['inspect', {str(path)!r}, '--scan'], ['diff', {str(path)!r}, {str(path)!r}]):\n"
        "    assert CliRunner().invoke(cli, args).exit_code == 0, args\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
