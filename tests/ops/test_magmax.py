"""MagMax against its formula, element by element."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, exact, make, normal, streamed

import surgery.ops as ops


def magmax(xs: list[np.ndarray], scale: float) -> np.ndarray:
    out = np.zeros(xs[0].size)
    for k in range(out.size):
        for x in xs:
            v = x.reshape(-1)[k]
            out[k] = v if abs(v) >= abs(out[k]) else out[k]
    return scale * out.reshape(xs[0].shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_magmax(kind: str, shape: tuple[int, ...]) -> None:
    for count in (1, 2, 5):
        xs = make(kind, shape, count)
        for scale in (1, 0.5, -2.0, 0.0):
            close(ops.magmax(*xs, scale=scale), magmax(exact(xs), scale), xs, 2)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_last_of_equals(vectors: list[list[float]]) -> None:
    made = ops.magmax(*[torch.tensor(v) for v in vectors])
    assert made.tolist() == magmax([np.array(v) for v in vectors], 1.0).tolist()


def test_streamed(tmp_path: Path) -> None:
    found, at_once = streamed(tmp_path, "magmax", normal(LARGE["three pieces"], 3), scale=0.5)
    assert torch.equal(found, at_once)
