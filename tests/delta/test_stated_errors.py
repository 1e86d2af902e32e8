"""What packages say of themselves is true: the error of every tensor of every view, and what exact tensors need at the least.

Random tensors, codecs and scales; errors are taken here in float64 from the files that `apply` writes, as the format defines
them. What is stated of a preview or of a task is against the model that was packed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import read_checkpoint, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import on_base, packed, progressive, shared_package, view_of

from surgery.delta.apply import apply
from surgery.delta.choices import fixed
from surgery.delta.codecs.exact import FAST, RAW, ULP
from surgery.delta.container import Package
from surgery.delta.sharing import Method
from surgery.delta.view import overview
from surgery.inputs import open_node

FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("dither", {"bits": 0.6}), ("dither", {"max_error": 2e-3}), ("svd_wf", {"bits": 1.0}), ("sign", {}), ("dare", {}),
    ("ternary", {"density": 0.2}), ("group", {"bits": 3}), ("nf4", {}), ("lowrank", {"rank": 2}), ("sparse", {"density": 0.1}),
]  # fmt: skip
SHAPES = [(1, 1), (16, 16), (40, 24), (33,), (2, 3, 8)]


def models(folder: Path, seed: int, kind: str, scale: float, count: int) -> list[Path]:
    """A base and tuned models: heavy tails, rows that did not change, a tensor that did not."""
    rng, dtype = np.random.default_rng(seed), KINDS[kind]
    shapes = {f"w{i}": shape for i, shape in enumerate(SHAPES)}
    base = {n: (rng.standard_normal(s) * 10.0 ** rng.integers(-3, 1)).astype(dtype) for n, s in shapes.items()}
    made = [write_checkpoint(folder / "base", base)]
    for i in range(count):
        tuned = {}
        for name, value in base.items():
            moved = rng.standard_t(3, value.shape) * scale
            moved[: len(moved) // 3] = 0.0
            tuned[name] = (value.astype(np.float64) + moved * (name != "w4")).astype(dtype)
        made.append(write_checkpoint(folder / f"tuned{i}", tuned))
    return made


def check(package: str | Path, base: Path, tuned: Path, out: Path) -> int:
    """Every stated error of a view against what it makes; how many there were."""
    apply(on_base(package, base), out, threads=1)
    old, wanted, found = (
        {n: v.astype(np.float64) for n, v in read_checkpoint(folder).items()} for folder in (base, tuned, out)
    )
    stated = 0
    for name, entry in Package(str(package)).manifest.entries.items():
        error, moved = np.abs(found[name] - wanted[name]), wanted[name] - old[name]
        if not (entry.lossy or entry.masked):
            assert error.max() == 0.0, name
            continue
        said = entry.layer["error"]
        assert said["max_abs"] == pytest.approx(error.max(), rel=1e-9, abs=1e-300), name
        assert error.max() <= said.get("bound", np.inf), name
        if moved.any():
            assert said["rel_fro"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(moved), rel=1e-6)
            power = (moved * moved).sum()
            assert said["gain"] == pytest.approx(((found[name] - old[name]) * moved).sum() / power, rel=1e-6, abs=1e-12)
        stated += 1
    return stated


GIVEN = {
    "seed": st.integers(0, 10**6),
    "kind": st.sampled_from(sorted(KINDS)),
    "scale": st.sampled_from([1e-4, 3e-3, 0.1]),
}


@given(codec=st.sampled_from(CODECS), **GIVEN)
@FEW
def test_lossy_packages_and_previews(codec, seed, kind, scale):
    name, options = codec
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, tuned = models(folder, seed, kind, scale, 1)
        only = ["*"] if name in ("dither", "sparse", "dare", "sign", "ternary", "group", "nf4") else ["w1", "w2"]
        choose = fixed(open_node(str(tuned)), name, options, only)
        lossy = packed(base, tuned, folder / "l.delta.safetensors", choose=choose)
        both = progressive(base, tuned, folder / "p.delta.safetensors", name, only, **(options or {"scale": "gain"}))
        assert check(lossy, base, tuned, folder / "lossy") >= 2
        assert check(view_of(both, "preview"), base, tuned, folder / "first") >= 2
        apply(on_base(both, base), folder / "whole", threads=1)
        made, wanted = read_checkpoint(folder / "whole"), read_checkpoint(tuned)
        assert all(made[n].tobytes() == wanted[n].tobytes() for n in wanted)


@given(
    method=st.sampled_from([Method("emr", []), Method("tall", [0.4, 0.6])]),
    codec=st.sampled_from([("plain", {}), ("dither", {"bits": 4.0}), ("group", {"bits": 4})]),
    **GIVEN,
)
@FEW
def test_tasks(method, codec, seed, kind, scale):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, *tuned = models(folder, seed, kind, scale, 2)
        named = dict(zip(("one", "two"), tuned, strict=True))
        package = shared_package(base, named, folder / "t.delta.safetensors", method, *codec)
        assert sum(check(view_of(package, t), base, path, folder / t) for t, path in named.items()) >= 4


@given(codec=st.sampled_from([ULP, FAST, RAW]), **GIVEN)
@FEW
def test_no_tensor_needs_more_than_it_takes(codec, seed, kind, scale):
    """`limit`: what no code can do without is at most what this one took, of the smallest tensors as well."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, tuned = models(folder, seed, kind, scale, 1)
        package = packed(base, tuned, folder / "p.delta.safetensors", codec=codec)
        said = overview(Package(str(package)))
        for tensor in said["tensors"]:
            assert 0 <= tensor["limit_bytes"] <= tensor["bytes"], tensor["name"]
        assert 0 < said["total"]["limit_bits"] <= said["total"]["bits"]
