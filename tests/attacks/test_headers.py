"""Safetensors headers beyond those of tests/e2e/test_failures.py: what they make us allocate, print and believe."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import read_checkpoint, recipe, run, write_checkpoint, write_raw

import surgery
from surgery.checkpoint.header import read_header
from surgery.errors import Refused

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
BOMBS = {
    "lists": b"[" + b"[]," * 100_000 + b"[]]",
    "maps": b'{"x":[' + b"{}," * 100_000 + b"{}]}",
    "dimensions": b'{"x":{"dtype":"F32","shape":[' + b"0," * 300_000 + b'0],"data_offsets":[0,0]}}',
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(50_000)) + b"}}",
    "nested_maps": b'{"a":' * 900 + b"1" + b"}" * 900,
    "nested_too_deeply": b'{"a":' * 100_000,
    "numbers": b"[" + b"1e999," * 50_000 + b"1]",
    "a_long_number": b'{"x":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,8]}}',
    "a_long_name": b'{"' + b"x" * 10**6 + b'":1}',
    "escapes": b'{"' + b"\\u0041" * 10**5 + b'":1}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_costs_in_proportion_to_its_bytes(tmp_path: Path, name: str) -> None:
    """Python's objects take up to 40 bytes for each byte of JSON. What a header claims costs nothing at all."""
    path = write_raw(tmp_path / "model.safetensors", BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(Refused) if name != "metadata" else tracemalloc_noop():
            surgery.open(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(BOMBS[name]) + 10**6
    finally:
        tracemalloc.stop()


class tracemalloc_noop:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *problem: object) -> None:
        pass


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_cap_is_not_read(tmp_path: Path, length: int) -> None:
    """Even where the file is that long: it is sparse."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, min(length + 8, 10**12))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="declares a header"):
            surgery.open(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_an_empty_header_is_an_unfinished_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(Refused, match="not finished"):
        surgery.open(path)


@pytest.mark.parametrize("dimensions", [[10**9], [10**9] * 3, [2**62], [2**62, 2**62], [1] * 65, [10**9, 0, 10**9], [2**62, 0]])
def test_billions_of_elements_that_are_not_there(tmp_path: Path, dimensions: list[int]) -> None:
    """Refused where bytes would be needed; a tensor with a zero in its shape has none, and is carried through every operator."""
    entry = {"dtype": "F32", "shape": dimensions, "data_offsets": [0, 0]}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        write_raw(tmp_path / name / "model.safetensors", {"x": entry})
    if 0 not in dimensions:
        with pytest.raises(Refused, match=r"model.safetensors: is malformed"):
            surgery.open(tmp_path / "a")
        return
    for i, op in enumerate(("average, of: [base, a, b]", "stock, of: [base, a, b]", "slerp, of: [base, a], t: 0.5")):
        models = ("base", "a", "b") if "b]" in op else ("base", "a")
        path = recipe(tmp_path, f"out: {{op: {op}}}", models=models)
        try:
            run(path, tmp_path / f"out{i}")
        except Refused as found:
            assert "x" in found.message
            continue
        assert surgery.open(tmp_path / f"out{i}")["x"].shape == tuple(dimensions)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "\x00", "\x7f", "\u202etxt.exe", "\ud800", "\u200b", "a\rb", "\x9b31m"])
def test_names_that_would_write_to_the_terminal(tmp_path: Path, name: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", json.dumps({name: EMPTY}).encode())
    with pytest.raises(Refused, match="cannot be printed") as found:
        surgery.open(path)
    assert str(found.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "/dev/null", "%s%n{0}", "__metadata__ ", "a" * 10_000, "ключ", "C:\\x"])
def test_strange_names_are_names(tmp_path: Path, name: str) -> None:
    """A tensor's name is never a path, a format or an attribute."""
    tensors = {name: np.ones(3, np.float32), "y": np.zeros(2, np.float32)}
    source = surgery.open(write_checkpoint(tmp_path / "m", tensors))
    (source * 1.0).save(tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").keys() == tensors.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_headers_of_any_alignment_are_read(tmp_path: Path) -> None:
    """Unaligned data is legal: read by position, never cast in place."""
    value = np.arange(5, dtype=np.float64)
    for blanks in range(9):
        raw = json.dumps({"x": {"dtype": "F64", "shape": [5], "data_offsets": [0, 40]}}).encode() + b" " * blanks
        path = write_raw(tmp_path / f"{blanks}.safetensors", raw, value.tobytes())
        (stored,) = read_header(str(path)).tensors.values()
        assert stored.offset == 8 + len(raw)
        assert surgery.open(path)["x"].compute().tolist() == [0, 1, 2, 3, 4]


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)}, shards=2)
    write_raw(
        tmp_path / "model-00002-of-00002.safetensors",
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate("yx")},
        b"\0" * 16,
    )
    with pytest.raises(Refused, match=r"`x` is also in"):
        surgery.open(tmp_path)
