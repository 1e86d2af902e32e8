"""slerp as mergekit has it, against its definition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgery import ops


def reference(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = [n if n > 1e-8 else 1.0 for n in (np.linalg.norm(x), np.linalg.norm(y))]
    cos = float(np.clip((x / norms[0]) @ (y / norms[1]), -1, 1))
    if abs(cos) > 0.9995:
        return ((1 - t) * x + t * y).reshape(a.shape)
    theta = math.acos(cos)
    return ((math.sin((1 - t) * theta) * x + math.sin(t * theta) * y) / math.sin(theta)).reshape(a.shape)


def pair(cosine: float, size: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors with a given cosine and unequal norms."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, size))
    a /= np.linalg.norm(a)
    b -= (b @ a) * a
    b /= np.linalg.norm(b)
    return a, 3 * (cosine * a + math.sqrt(1 - cosine**2) * b)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("cosine", [0.0, 0.5, -0.7, 0.99, 0.9994, 0.9996, 0.9999999, 1.0, -0.9994, -0.9996])
def test_on_both_sides_of_the_threshold(cosine: float, t: float) -> None:
    a, b = pair(cosine)
    made = ops.slerp(torch.from_numpy(a), torch.from_numpy(b), t=t, like="mergekit").numpy()
    np.testing.assert_allclose(made, reference(a, b, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.from_numpy(x).reshape(20, 50).to(dtype) for x in pair(0.6))
    made = ops.slerp(a, b, t=0.3, like="mergekit")
    np.testing.assert_allclose(made.numpy(), reference(a.double().numpy(), b.double().numpy(), 0.3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(5,), (), (1,), (0,), (2, 3)])
def test_zero_vectors_and_small_shapes(shape: tuple[int, ...], t: float) -> None:
    zero, one = np.zeros(shape), np.ones(shape)
    for a, b in ((zero, one), (one, zero), (zero, zero), (one, one)):
        made = ops.slerp(torch.from_numpy(a), torch.from_numpy(b), t=t, like="mergekit").numpy()
        np.testing.assert_allclose(made, reference(a, b, t), rtol=1e-9, atol=1e-12)


def test_the_input_need_not_be_contiguous() -> None:
    a, b = (torch.from_numpy(x).reshape(20, 50) for x in pair(0.6))
    made = ops.slerp(a.T, b.T, t=0.3, like="mergekit")
    torch.testing.assert_close(made, ops.slerp(a.T.contiguous(), b.T.contiguous(), t=0.3, like="mergekit"), rtol=0, atol=0)


def test_it_differs_from_slerp_only_near_the_threshold() -> None:
    a, b = (torch.from_numpy(x) for x in pair(0.9996))
    straight, arc = ops.slerp(a, b, t=0.3, like="mergekit"), ops.slerp(a, b, t=0.3)
    assert 0 < (straight - arc).abs().max() < 1e-4
    a, b = (torch.from_numpy(x) for x in pair(0.9))
    torch.testing.assert_close(ops.slerp(a, b, t=0.3, like="mergekit"), ops.slerp(a, b, t=0.3), rtol=1e-12, atol=0)
