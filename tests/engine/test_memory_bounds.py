"""`--memory` holds: measured by the kernel, in processes of their own, on tensors that are larger than what may be held."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from helpers import BF16, recipe, write_checkpoint

from surgery.ops.declare import registry

HERE = Path(__file__).parent
MATRIX = sorted(op.name for op in registry.values() if op.locality == "matrix" and not op.linear and not op.takes.statistics)
STREAMED = ("ties", "dare", "pcb", "geometric_median")
DELTAS = "d0: {op: diff, of: [a, base]}\nd1: {op: diff, of: [b, base]}\n"


def peaks(folder: Path, cases: list[Any]) -> list[tuple[int, int, str]]:
    file = folder / "cases.json"
    file.write_text(json.dumps([[str(p), memory, str(out)] for p, memory, out in cases]))
    command = [sys.executable, str(HERE / "peaks.py"), str(file)]
    where = {"PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=where, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def models(folder: Path, shape: tuple[int, int]) -> None:
    """Numbers from 0.5 to 2 of either sign, made fast."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        bits = rng.integers(0, 1 << 16, shape, np.uint16)
        values = ((bits & 0x80FF) | 0x3F00).view(BF16)
        write_checkpoint(folder / name, {"model.layers.0.w.weight": values}, config={"model_type": "x"})


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
    models(tmp_path, (384, 768))
    paths = {name: written(tmp_path, name, steps(name)) for name in MATRIX}
    found = peaks(tmp_path, [(p, "needed", tmp_path / f"out-{n}") for n, p in paths.items()])
    for name, (needs, peak, said) in zip(paths, found, strict=True):
        assert not said and peak <= needs, (name, peak, needs)
    found = peaks(tmp_path, [(p, "less", tmp_path / f"less-{n}") for n, p in paths.items()])
    for name, (_, _, said) in zip(paths, found, strict=True):
        assert "this plan needs at least" in said, name
        assert not (tmp_path / f"less-{name}").exists() and not (tmp_path / f"less-{name}.partial").exists()


def test_streamed_operators_keep_a_bound_far_below_the_models(tmp_path: Path) -> None:
    """24 million elements of three models: 144 MB as stored, 288 as float32; 330 MB are allowed, of which torch's imports, which
    these need not have, are most here."""
    models(tmp_path, (4000, 6000))
    cases = [(written(tmp_path, name, steps(name)), "330MB", tmp_path / f"out-{name}") for name in STREAMED]
    for name, (_, peak, said) in zip(STREAMED, peaks(tmp_path, cases), strict=True):
        assert not said and peak <= 330e6, (name, peak, said)


def test_what_thresholds_gather_is_counted(tmp_path: Path) -> None:
    """Two layers of very different size of delta: one threshold over both, which a sample brackets badly, and of each alone.
    Nothing is beyond what the plan says, what is gathered is part of it, and less memory than that is refused."""
    rng = np.random.default_rng(0)
    shape = (1600, 2000)
    for name in ("base", "a", "b"):
        tensors = {f"model.layers.{i}.w.weight": rng.standard_normal(shape, np.float32) * 4.0**i for i in range(2)}
        write_checkpoint(tmp_path / name, tensors, config={"model_type": "x"})
    ends = "\nout: {op: add, of: [base, t]}"
    texts = {
        "global": DELTAS + "t: {op: ties, of: [d0, d1], density: 0.3, trim: global}" + ends,
        "each": DELTAS + "t: {op: ties, of: [d0, d1], density: 0.3, trim: tensor}" + ends,
        "sce": DELTAS + "t: {op: sce, of: [d0, d1], topk: 0.3}" + ends,
        "breadcrumbs": DELTAS.splitlines()[0] + "\nt: {op: breadcrumbs, of: d0, density: 0.5, gamma: 0.1}" + ends,
        "none": DELTAS + "t: {op: add, of: [d0, d1]}" + ends,
    }
    numel = shape[0] * shape[1]
    from helpers import plan

    paths = {name: written(tmp_path, name, text) for name, text in texts.items()}
    prices = {name: plan(p).price for name, p in paths.items()}
    selecting = 4 * (4 << 21)  # of two million numbers
    assert (prices["global"].gathered, prices["global"].gathers) == (2 * 2 * numel * 4 + selecting, 0)
    assert (prices["each"].gathered, prices["each"].gathers) == (0, 2 * numel * 4 + selecting)
    assert prices["breadcrumbs"].gathers == 2 * numel * 4 + selecting and prices["sce"].gathers >= numel * 4 + selecting
    assert (prices["none"].gathered, prices["none"].gathers) == (0, 0)
    found = dict(zip(texts, peaks(tmp_path, [(p, None, tmp_path / f"out-{n}") for n, p in paths.items()]), strict=True))
    for name, (needs, peak, said) in found.items():  # beside a sum, which gathers nothing: the fork has torch, these do not need it
        stated, taken = needs - found["none"][0], peak - found["none"][1]
        assert not said and taken <= stated, (name, taken, stated)
        if name in ("global", "each"):
            assert taken > stated - prices[name].gathered - prices[name].gathers  # it would be beyond a plan that forgot it
    ((_, _, said),) = peaks(tmp_path, [(paths["global"], "less", tmp_path / "less")])
    assert "this plan needs at least" in said
