"""`--memory` holds: measured by the kernel, in processes of their own, on tensors that are larger than what may be held."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, recipe, write_checkpoint

from surgery.ops.declare import registry

HERE = Path(__file__).parent
MATRIX = sorted(op.name for op in registry.values() if op.locality == "matrix" and not op.linear and not op.takes.statistics)
DELTAS = "d0: {op: diff, of: [a, base]}\nd1: {op: diff, of: [b, base]}\n"


def peaks(folder: Path, cases: list[Any]) -> list[tuple[int, int, str]]:
    file = folder / "cases.json"
    file.write_text(json.dumps([[str(p), memory, str(out)] for p, memory, out in cases]))
    command = [sys.executable, str(HERE / "peaks.py"), str(file)]
    where = {"PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=where, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def models(folder: Path, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape, np.float32)
    for name in ("base", "a", "b"):
        moved = base if name == "base" else base + 0.1 * rng.standard_normal(shape, np.float32)
        write_checkpoint(folder / name, {"model.layers.0.w.weight": moved.astype(BF16)}, config={"model_type": "x"})


def steps(name: str) -> str:
    op = registry[name]
    if op.takes.space_of(0) != "delta":
        return f"out: {{op: {name}, of: [a, b]}}"
    of = ["d0"] if op.takes.at_most == 1 else ["d0", "d1"]
    more = ", steps: 2" if op.param("steps") else ""
    used = DELTAS if len(of) > 1 else DELTAS.splitlines()[0] + "\n"
    return used + f"t: {{op: {name}, of: [{', '.join(of)}]{more}}}\nout: {{op: add, of: [base, t]}}"


def written(folder: Path, name: str, text: str) -> Path:
    used = [m for m in ("base", "a", "b") if f"{m}]" in text or f"{m}," in text]
    path = recipe(folder, text, models=used)
    return path.rename(folder / f"{name}.yaml")


def test_matrix_operators_take_what_they_ask_for_and_refuse_below_it(tmp_path: Path) -> None:
    """Every one of the registry; wide enough that a tensor is more than the interpreter's own ups and downs."""
    models(tmp_path, (640, 1280))
    paths = {name: written(tmp_path, name, steps(name)) for name in MATRIX}
    found = peaks(tmp_path, [(p, "needed", tmp_path / f"out-{n}") for n, p in paths.items()])
    for name, (needs, peak, said) in zip(paths, found, strict=True):
        assert not said and peak <= needs, (name, peak, needs)
    found = peaks(tmp_path, [(p, "less", tmp_path / f"less-{n}") for n, p in paths.items()])
    for name, (_, _, said) in zip(paths, found, strict=True):
        assert "this plan needs at least" in said, name
        assert not (tmp_path / f"less-{name}").exists() and not (tmp_path / f"less-{name}.partial").exists()


@pytest.mark.parametrize("name", ["ties", "dare", "pcb", "emr_unified", "geometric_median", "sce"])
def test_streamed_operators_keep_a_bound_far_below_the_models(name: str, tmp_path: Path) -> None:
    """48 million elements, 96 MB as stored, 192 as float32, of three models; 330 MB in all, of which torch is 230."""
    models(tmp_path, (6000, 8000))
    text = steps(name) if registry[name].takes.space_of(0) == "delta" else f"out: {{op: {name}, of: [base, a, b]}}"
    ((needs, peak, said),) = peaks(tmp_path, [(written(tmp_path, name, text), "400MB", tmp_path / "out")])
    assert not said and peak <= 400e6, (peak, needs)
