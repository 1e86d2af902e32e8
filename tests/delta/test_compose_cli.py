"""`surgery delta compose` as its user runs it: chains and weighted sums, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import all_bytes, read_checkpoint, write_checkpoint
from packing import MATRIX, packed, pair, three, tuned_from

from surgery.cli.delta_ import command
from surgery.errors import Refused


def delta(*args: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, models = three(tmp_path)
    for task, bits in (("one", "2"), ("two", "3")):
        delta("pack", "--base", base, "--model", models[task], "-o", tmp_path / f"{task}.delta.safetensors", "--bits", bits, "--codec", "dither", "-q")
        delta("apply", tmp_path / f"{task}.delta.safetensors", "--base", base, "-o", tmp_path / f"of-{task}", "-q")
    return tmp_path


def test_a_weighted_sum(folder: Path) -> None:
    """base + 0.5 of what one package changes + 0.25 of the other's, within the rounding of both packages' own results."""
    sources = [folder / "one.delta.safetensors", folder / "two.delta.safetensors"]
    out = folder / "sum.delta.safetensors"
    delta("compose", *sources, "--sum", "--weight", 0.5, "--weight", 0.25, "--base", folder / "base", "-o", out, "-q")
    delta("verify", out, "--base", folder / "base")
    delta("apply", out, "--base", folder / "base", "-o", folder / "out", "-q")
    base, one, two, made = (
        {n: v.astype(np.float64) for n, v in read_checkpoint(folder / name).items()} for name in ("base", "of-one", "of-two", "out")
    )
    assert not np.array_equal(made[MATRIX], base[MATRIX])
    for name, b in base.items():
        wanted = b + 0.5 * (one[name] - b) + 0.25 * (two[name] - b)
        off = np.abs(made[name] - wanted)
        assert (off <= 2.0**-8 * (np.abs(made[name]) + np.abs(one[name]) + np.abs(two[name]))).all(), name
    assert "sum/1" in delta("inspect", out)
    assert out.stat().st_size < 1.2 * sum(s.stat().st_size for s in sources)  # codes side by side, nothing coded again


def test_a_chain(tmp_path: Path) -> None:
    base, one = pair(tmp_path)
    two = write_checkpoint(tmp_path / "two", tuned_from(read_checkpoint(one), 2))
    steps = [packed(base, one, tmp_path / "1.delta.safetensors"), packed(one, two, tmp_path / "2.delta.safetensors")]
    out = tmp_path / "both.delta.safetensors"
    delta("compose", *steps, "--base", base, "-o", out, "-q")
    delta("apply", out, "--base", base, "-o", tmp_path / "out", "-q")
    assert all_bytes(tmp_path / "out") == all_bytes(two)


def test_what_cannot_be_composed(folder: Path) -> None:
    one, two, out = folder / "one.delta.safetensors", folder / "two.delta.safetensors", folder / "x.delta.safetensors"
    for args, said in (
        ((one, two, "--sum", "--weight", 1, "--base", folder / "base"), "1 time"),
        ((one, two, "--weight", 1, "--base", folder / "base"), "--weight goes with --sum"),
        ((one, two, "--sum", "--base", folder / "of-one"), "not the base"),
        ((one, two, "--base", folder / "base"), "not the base"),
    ):
        with pytest.raises(Refused, match=said):
            delta("compose", *args, "-o", out, "-q")
        assert not list(folder.glob("x.delta*"))
