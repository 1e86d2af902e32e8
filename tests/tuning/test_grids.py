"""Rounding in torch against what the codec of the same name decodes, and its gradients against the formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import surgery.delta.lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.tuning.grids import Grid, count, rounded

WAYS = [
    *(("hadamard", {"bits": b, "scale": s}) for b in (1, 2, 4, 8) for s in ("l2", "gain")),
    *(("group", {"bits": b, "group": g, "scale": "l2"}) for b in (2, 3, 4, 8) for g in (16, 64)),
    ("group", {"bits": 4, "group": 24, "scale": "gain"}),
    *(("quantile", {"bits": b, "criterion": c}) for b in (1, 2, 3, 4) for c in ("l1", "mse")),
]


def grid(name: str, **options: Any) -> Grid:
    return Grid.KINDS[name](check_options(lossy_codec(name), options))


@pytest.mark.parametrize("name, options", WAYS, ids=str)
@pytest.mark.parametrize("shape", [(24, 128), (5, 200), (7, 37), (6, 3, 3, 3)], ids=str)
def test_values_are_what_the_codec_decodes(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(len(shape) + shape[-1])
    x = (draw.standard_t(4, shape) * 0.03).astype(np.float32)
    x[0] = 0.0  # a row of zeros
    x[1].reshape(-1)[2] = 0.9  # an outlier
    codec = lossy_codec(name)
    coded = codec.encode(x, key="w", **check_options(codec, options))
    expected = codec.decode(coded, shape, "w", 0, x.size).reshape(shape)
    made = rounded(torch.from_numpy(x), grid(name, **options)).numpy()
    assert made.dtype == np.float32
    # the same code everywhere: two neighbouring levels are far more than this apart
    np.testing.assert_allclose(made, expected, rtol=2e-6, atol=1e-9 + 2e-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["hadamard", "group", "quantile"])
def test_gradient_goes_straight_through(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 40, requires_grad=True)
    g = torch.randn(6, 40)
    rounded(x, grid(name, bits=2)).backward(g)
    torch.testing.assert_close(x.grad, g)
    zero = torch.zeros(6, 40, requires_grad=True)  # an adapter's factor at the start
    made = rounded(zero, grid(name, bits=2), trust=name == "hadamard")
    made.backward(g)
    assert made.abs().max() == 0
    torch.testing.assert_close(zero.grad, g)


def sylvester(n: int) -> np.ndarray:
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]) / np.sqrt(n)


def whole(length: int) -> np.ndarray:
    """The turn of a whole row: 128s, then the binary digits of the rest."""
    sizes = [128] * (length // 128) + [1 << k for k in range(6, -1, -1) if (length % 128) >> k & 1]
    made, at = np.zeros((length, length)), 0
    for n in sizes:
        made[at : at + n, at : at + n] = sylvester(n)
        at += n
    return made


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("length", [64, 172])
def test_trust_drops_what_lies_beyond_the_grid(bits: int, length: int) -> None:
    c = {1: 0.79788, 2: 1.49353, 4: 2.51393}[bits]
    draw = np.random.default_rng(bits)
    x, g = draw.standard_normal((8, length)), draw.standard_normal((8, length))
    turn = whole(length)
    y = x @ turn
    s = c * np.sqrt(np.square(x).mean(1, keepdims=True))
    levels = (2 * np.arange(2**bits) - (2**bits - 1)) / (2**bits - 1)
    nearest = np.abs(y[..., None] - s[..., None] * levels).min(-1)
    kept = nearest <= s / (2**bits - 1)
    sure = np.abs(nearest - s / (2**bits - 1)) > 2e-3 * s  # steps are float16, and c has five digits
    assert 0.5 < kept.mean() < 0.999
    given = torch.tensor(x, requires_grad=True)
    rounded(given, grid("hadamard", bits=bits, signs=False), trust=True).backward(torch.tensor(g))
    found = given.grad.numpy() @ turn  # turned again, as the mask is there
    expected = np.where(kept, g @ turn, 0.0)
    np.testing.assert_allclose(found[sure], expected[sure], atol=1e-10)


@pytest.mark.parametrize("name, options", [("group", {"bits": 3, "group": 8}), ("quantile", {"bits": 2, "criterion": "mse"})])
def test_a_learned_step_has_lsqs_gradient(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    x = (torch.randn(4, 16, dtype=torch.float64) * 0.1).requires_grad_()
    g = torch.randn(4, 16, dtype=torch.float64)
    own = grid(name, **options)
    log = torch.full((count(x, own),), -0.5, dtype=torch.float64, requires_grad=True)  # smaller steps: some are beyond the grid
    made = rounded(x, own, learned=log)
    made.backward(g)
    v = x.detach().numpy()
    if name == "group":
        book, u_of = np.arange(8) - 3.5, v.reshape(8, 8)
        _, s0 = own.steps(own.arrange(x.detach()))
        shift, s = 0.0, s0.reshape(8, 1).numpy() * np.exp(-0.5)
        beyond = 4.0
    else:
        book = np.array([-1.5104, -0.4528, 0.4528, 1.5104])  # Lloyd and Max
        u_of, shift = v.reshape(1, -1), v.mean()
        s = np.full((1, 1), v.std() * np.exp(-0.5))
        beyond = 2 * 1.5104 - (1.5104 + 0.4528) / 2
    u = (u_of - shift) / s
    level = book[np.abs(u[..., None] - book).argmin(-1)]
    np.testing.assert_allclose(made.detach().numpy().reshape(u.shape), shift + s * level, atol=1e-4)
    inside = np.abs(u) <= beyond
    assert 0.3 < inside.mean() < 1.0
    by = g.numpy().reshape(u.shape)
    np.testing.assert_allclose(x.grad.numpy().reshape(u.shape), np.where(inside, by, 0.0), atol=1e-12)
    toward = np.where(inside, level - u, level)
    np.testing.assert_allclose(log.grad.numpy(), (by * toward * s).sum(1), rtol=2e-3, atol=1e-4)
