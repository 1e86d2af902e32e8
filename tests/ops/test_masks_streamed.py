"""What is measured over a whole model, streamed from files in pieces, against the flat definition in float64."""

from pathlib import Path

import numpy as np
import pytest
from helpers import read_checkpoint, recipe, run, write_file
from test_masks_reference import emr_reference, localize_reference, pcb_reference, tall_reference

import surgery
from surgery.engine.pieces import PIECE

SHAPES = {"z.first": (3,), "block.0.w": (700, 1000), "block.1.w": (30, 40, 5), "long": (PIECE + 77,), "scalar": (), "none": (0, 4)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """base (zeros) and three models whose deltas are therefore known exactly; one is heavy-tailed, one mostly zero."""
    folder = tmp_path_factory.mktemp("masks")
    rng = np.random.default_rng(3)
    made = []
    for name in ("base", "a", "b", "c"):
        tensors = {}
        for key, shape in SHAPES.items():
            x = rng.standard_normal(shape) * 0.02
            x = {"base": x * 0, "a": x, "b": x * np.abs(x) * 50, "c": x * (rng.random(shape) < 0.4)}[name]
            tensors[key] = np.array(x, np.float32)
        write_file(folder / name / "model.safetensors", tensors)
        made.append(tensors)
    return folder, made[1:]


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[k].reshape(-1).astype(np.float64) for k in SHAPES])


def streamed(folder: Path, op: str, of: str, tmp_path: Path, threads: int = 2, **more: object) -> dict[str, np.ndarray]:
    """The operator applied to deltas by a recipe and a run."""
    said = "".join(f", {k}: {v}" for k, v in more.items())
    steps = "\n".join(f"d{m}: {{op: diff, of: [{m}, base]}}" for m in "abc")
    steps += f"\nt: {{op: {op}, of: [{of}]{said}}}\nout: {{op: add, of: [base, t]}}"
    path = recipe(folder, steps, models=("base", "a", "b", "c"))
    run(path, tmp_path / f"out{threads}", threads=threads)
    return read_checkpoint(tmp_path / f"out{threads}")


def test_emr(models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    folder, tensors = models
    ds = [flat(t) for t in tensors]  # the reference of the small tests goes by element; here the same formula at once
    g = np.where(sum(ds) > 0, 1.0, -1.0)
    u = g * np.max([np.where(d * g > 0, np.abs(d), 0) for d in ds], axis=0)
    np.testing.assert_array_equal(emr_reference([d[:2000] for d in ds])[0], u[:2000])
    mask = ds[1] * g > 0
    expected = np.abs(ds[1]).sum() / np.abs(mask * u).sum() * mask * u
    found = flat(streamed(folder, "emr", "db, da, db, dc", tmp_path))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    per_tensor = surgery.ops.emr(*[_delta(folder, m)["z.first"].compute() for m in "babc"])
    assert not np.allclose(per_tensor.numpy(), found[:3], rtol=1e-3)  # the scale is the model's, not the tensor's


def _delta(folder: Path, name: str) -> surgery.Checkpoint:
    return surgery.open(folder / name) - surgery.open(folder / "base")


def test_localize(models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    folder, tensors = models
    expected = localize_reference([flat(t) for t in tensors], [0.1, 0.02, 0.3])
    found = flat(streamed(folder, "localize", "da, db, dc", tmp_path, density="[0.1, 0.02, 0.3]"))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(found != 0, expected != 0)


def test_localize_per_tensor(models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    folder, tensors = models
    found = streamed(folder, "localize", "da, db, dc", tmp_path, scope="tensor", density=0.25)
    for key in SHAPES:
        expected = localize_reference([t[key].astype(np.float64) for t in tensors], [0.25] * 3)
        np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=1e-8)


def test_pcb(models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    folder, tensors = models
    expected, doubtful = pcb_reference([flat(t) for t in tensors], 0.1, 1.2, 1e-4)
    found = flat(streamed(folder, "pcb", "da, db, dc", tmp_path, rho=0.1, alpha=1.2))
    assert doubtful.mean() < 0.005
    np.testing.assert_allclose(found[~doubtful], expected[~doubtful], rtol=2e-3, atol=1e-7)
    np.testing.assert_array_equal((found != 0)[~doubtful], (expected != 0)[~doubtful])


def test_consensus_with_a_threshold_per_delta_and_a_gradient(
    models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    folder, tensors = models
    found = streamed(folder, "consensus", "da, db, dc", tmp_path, threshold="[0.2, 0.4, 0.6]", alpha='{"block.*": 0.5, "*": 1.0}')
    for key in SHAPES:
        ds = [t[key].astype(np.float64) for t in tensors]
        masks, doubtful = tall_reference(ds, [0.2, 0.4, 0.6])
        expected = sum(ds) * (np.sum(masks, axis=0) >= 2) * (0.5 if key.startswith("block") else 1.0)
        np.testing.assert_allclose(found[key][~doubtful], expected[~doubtful], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("op", "of"), [("pcb", "da, db, dc"), ("localize", "da, db, dc"), ("emr", "da, da, db, dc")])
def test_threads_change_nothing(
    op: str, of: str, models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    one, three = (streamed(models[0], op, of, tmp_path, threads=n) for n in (1, 3))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in three.items()}


def test_a_nan_is_refused_by_name(models: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    folder, tensors = models
    bad = {k: v.copy() for k, v in tensors[0].items()}
    bad["block.1.w"].reshape(-1)[17] = np.nan
    write_file(tmp_path / "bad" / "model.safetensors", bad)
    base, a = surgery.open(folder / "base"), surgery.open(folder / "a")
    for name in ("pcb", "localize", "emr_unified", "consensus"):
        merged = getattr(surgery.ops, name)([surgery.open(tmp_path / "bad") - base, a - base])
        with pytest.raises(surgery.Refused, match=r"block\.1\.w.*NaN"):
            (base + merged).save(tmp_path / f"out-{name}")


def test_statistics_are_no_deltas_and_votes_are_checked_at_plan(models: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    folder, _ = models
    da, db = _delta(folder, "a"), _delta(folder, "b")
    with pytest.raises(surgery.Refused, match="cannot agree"):
        surgery.ops.consensus(da, db, k=3).plan()
    with pytest.raises(surgery.Refused, match="is weights"):
        surgery.ops.pcb(surgery.open(folder / "a"), db)
