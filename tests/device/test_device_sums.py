"""Sums on a device have the bits that the processor gives: every linear operator, and numbers that round badly."""

from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import BF16, all_bytes, write_checkpoint, write_file

import surgery
from surgery.device.crew import OnDevice, hire
from surgery.engine import pieces
from surgery.engine.run import run
from surgery.errors import Refused
from surgery.ops.declare import REQUIRED, registry

LINEAR = sorted(op.name for op in registry.values() if op.linear and op.name != "stitch")
SHAPES = {"matrix": (70, 60), "vector": (3000,), "stack": (3, 40, 30), "scalar": (), "none": (0, 7), "long_row": (2, 1500)}


def rough(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, largest: float) -> np.ndarray:
    """Numbers of all magnitudes, with subnormal ones, zeros of both signs, the largest and exact halves."""
    size = int(np.prod(shape))
    made = rng.standard_normal(size) * 2.0 ** rng.integers(-20, 4, size)
    special = [0.0, -0.0, 1e-40, -3e-41, 9.2e-41, 6e-8, -5.96e-8, largest, -largest / 3, 1.00390625, 1.01171875, 0.5]
    if size > 4 * len(special):
        made[rng.choice(size, 4 * len(special), replace=False)] = special * 4
    return made.reshape(shape).astype(dtype)


def checkpoints(folder: Path, dtypes: list[Any], largest: float = 3e4) -> list[Any]:
    rng = np.random.default_rng(5)
    for i, dtype in enumerate(dtypes):
        tensors = {name: rough(rng, shape, dtype, largest) for name, shape in SHAPES.items()}
        write_checkpoint(folder / f"m{i}", tensors, config={"model_type": "x"})
    return [surgery.open(folder / f"m{i}") for i in range(len(dtypes))]


def applied(name: str, models: list[Any]) -> Any:
    """A linear operator over models, or over what they differ by from the last, added to it."""
    op, (*models, base) = registry[name], models
    given = {p.name: 0.3 for p in op.params if p.default is REQUIRED}
    count = 1 if name == "lines" else min(op.takes.at_most, len(models))
    inputs = [m - base if op.takes.space_of(i) == "delta" else m for i, m in enumerate(models[:count])]
    made = op(*inputs, **given)
    return base + made if made.space == "delta" else made


def both(made: Any, folder: Path, device: Any = "torch:cpu", **how: Any) -> list[dict[str, bytes]]:
    """The files that a run writes on the processor and on a device; the latter must have had sums to do."""
    settings = {k: how.pop(k) for k in ("dtype",) if k in how}
    if isinstance(device, str):
        hired = hire(device, pytest.fail)
    else:
        def hired(plan: Any, terms: Any) -> Any:
            return OnDevice(plan, terms, device, pytest.fail, lambda text: None)
    written = []
    for n, crew in enumerate((None, hired)):
        out = folder / f"out{n}"
        run(made.plan(**settings), out, threads=2, overwrite=True, **how, **({} if crew is None else {"hire": crew}))
        written.append(all_bytes(out))
    return written


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_operator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many pieces, of types that are anchored and of mixed ones."""
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    for kinds in ([BF16] * 4, [BF16, np.float32, np.float16, BF16]):
        made = applied(name, checkpoints(tmp_path, kinds))
        here, there = both(made, tmp_path)
        assert here == there


def test_the_operators_with_statistics_are_among_them() -> None:
    assert {"slerp", "stock", "lines", "karcher", "add", "average", "lerp", "scale", "transfer"} <= set(LINEAR)


@pytest.mark.parametrize("kind", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_and_compiled_loops(kind: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy and, where they can be had, against the compiled loops; sums of sums, and conversion alone."""
    from surgery.ops import fast

    a, b, base = checkpoints(tmp_path, [kind] * 3, largest=2e4)
    nested = surgery.ops.average([surgery.ops.slerp([a, b], t=0.3), base], weight=[0.3, 0.7])
    for made, loops in product((nested, base + 0.3 * (a - base) - 1.7 * (b - base), a), (False, True)):
        with monkeypatch.context() as patch:
            patch.setattr(fast, "_loaded", None)
            if loops:
                fast.load()
            here, there = both(made, tmp_path, dtype=dtype)
        assert here == there


def test_another_machines_memory(tmp_path: Path, pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    for name in ("average", "stock", "slerp", "lines"):
        here, there = both(applied(name, checkpoints(tmp_path, [BF16] * 4)), tmp_path, pretended)
        assert here == there


def test_what_is_not_finite_is_refused_or_carried_along_as_on_the_processor(tmp_path: Path) -> None:
    odd = np.zeros((64, 64), np.float32)
    odd.reshape(-1)[[5, 9, 700]] = np.nan, -np.inf, 3e38
    odd.view(np.uint32).reshape(-1)[[80, 81, 82]] = 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001  # NaN that rounding could lose
    write_file(tmp_path / "a" / "model.safetensors", {"w": odd})
    write_file(tmp_path / "b" / "model.safetensors", {"w": np.full((64, 64), 2e38, np.float32)})
    a, b = surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b")
    made = surgery.ops.average([a, b], weight=[0.9, 0.1])
    for dtype in ("bfloat16", "float16", "float32"):
        here, there = both(made, tmp_path, dtype=dtype, allow_nonfinite=True)
        assert here == there
    said = []
    for crew in ({}, {"hire": hire("torch:cpu", pytest.fail)}):
        with pytest.raises(Refused, match=r"`w` holds NaN \(first at flat index 5") as refused:
            run(made.plan(), tmp_path / "out", overwrite=True, **crew)
        said.append(str(refused.value))
    assert said[0] == said[1]
    with pytest.raises(Refused, match="does not fit float16"):
        run((b * 2.0 - b).plan(dtype="float16"), tmp_path / "big", hire=hire("torch:cpu", pytest.fail))


def test_inputs_of_ours_are_checked_while_they_are_read(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "model.safetensors", {"w": np.ones((50, 20), ml_dtypes.bfloat16)})
    surgery.open(tmp_path / "a").save(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    made = surgery.ops.average([surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b")])
    with pytest.raises(Refused, match="`w` is damaged"):
        made.save(tmp_path / "out", device="torch:cpu")
