"""RAM and RAM+ against their formulas, element by element in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import KINDS, LARGE, SHAPES, close, exact, make, normal, streamed

import surgery.ops as ops


def ram(xs: list[np.ndarray], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    flat = [x.reshape(-1) for x in xs]
    active = [[i for i, x in enumerate(flat) if abs(x[k]) > epsilon] for k in range(flat[0].size)]
    factors = []
    for i in range(len(xs)):
        own = sum(a == [i] for a in active)
        shared = sum(i in a and len(a) > 1 for a in active)
        factors.append(1 + r * min(max(shared / max(own, 1e-5), 0.0), alpha))
    out = np.zeros(flat[0].size)
    for k, a in enumerate(active):
        if len(a) == 1:
            out[k] = factors[a[0]] * flat[a[0]][k]
        elif a:
            out[k] = sum(flat[i][k] for i in a) / len(a)
    return out.reshape(xs[0].shape)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ram_and_ramplus(kind: str, shape: tuple[int, ...]) -> None:
    for count in (1, 2, 4):
        xs = make(kind, shape, count)
        for epsilon in (0.0, 1e-5, 0.7):
            close(ops.ram(*xs, epsilon=epsilon), ram(exact(xs), epsilon), xs, 4)
            for r, alpha in ((0.1, 0.2), (1.0, 5.0), (0.5, 0.0)):
                wanted = ram(exact(xs), epsilon, r, alpha)
                close(ops.ramplus(*xs, r=r, alpha=alpha, epsilon=epsilon), wanted, xs, 4 * (1 + r * alpha))


def test_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, 0.0, 1e-6]), torch.tensor([0.0, 4.0, 0.0, 3.0])
    assert ops.ram(a, b).tolist() == [1.0, 3.0, 0.0, 3.0]
    assert ops.ramplus(a, b, r=0.5, alpha=1.0).tolist() == [1.5, 3.0, 0.0, 4.5]  # one shared, one own each
    assert ops.ram(a, b, epsilon=1e-7).tolist() == pytest.approx([1.0, 3.0, 0.0, 1.5000005])


@pytest.mark.parametrize("name", ["ram", "ramplus"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_streamed(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Each piece has its own share of own elements: the counts must be the tensor's."""
    xs = normal(shape, 2)
    xs[0].reshape(-1)[: xs[0].size // 3] = 0
    params = {"alpha": 5.0, "r": 1.0} if name == "ramplus" else {}
    found, at_once = streamed(tmp_path, name, xs, **params)
    assert torch.equal(found, at_once)
    if name == "ramplus":
        own, shared = xs[0].size // 3, xs[0].size - xs[0].size // 3  # of the second delta; normal numbers are above epsilon
        assert float(found.reshape(-1)[0] / xs[1].reshape(-1)[0]) == pytest.approx(1 + shared / own, rel=1e-3)


def test_what_is_measured_must_be_finite() -> None:
    with pytest.raises(FloatingPointError):
        ops.ramplus(torch.tensor([1.0, float("nan")]))
