"""Means of directions against their formulas, written down again in float64 on the vectors themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, exact, make, normal, rows_of, streamed

import surgery.ops as ops

everywhere = pytest.mark.parametrize("shape", SHAPES, ids=str)
everything = pytest.mark.parametrize("kind", KINDS)


def norm(x: np.ndarray) -> float:
    top = float(np.abs(x).max(initial=0.0))
    return top * math.sqrt(float(((x / top) ** 2).sum())) if top else 0.0


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    na, nb = norm(a), norm(b)
    cosine = float(((a / na) * (b / nb)).sum()) if na and nb else 0.0
    if cosine > 1 - 1e-12 or cosine < -1 + 1e-6:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


@everywhere
@everything
def test_nuslerp(kind: str, shape: tuple[int, ...]) -> None:
    a, b = xs = make(kind, shape, 2)
    for weight in ([1, 1], [0.7, 0.3], [0, 1], [1, 0], [1, -1], [2, -0.5]):
        even = sum(weight) == 0
        t, like = (0.5, "mergekit") if even else (weight[1] / sum(weight), None)
        x, y = exact(xs)
        close(ops.nuslerp(a, b, weight=weight, like=like), arc(x, y, t), xs, 10)
        rows, length = rows_of(shape)
        by_row = [arc(p, q, t) for p, q in zip(x.reshape(rows, length), y.reshape(rows, length), strict=True)]
        close(ops.nuslerp(a, b, weight=weight, flatten=False, like=like), np.array(by_row).reshape(shape), xs, 10)
        flat = [v.reshape(shape[0] if shape else 1, -1) if v.size else v.reshape(0, 0) for v in (x, y)]
        by_column = [arc(p, q, t) for p, q in zip(flat[0].T, flat[1].T, strict=True)]
        columns = np.array(by_column).T.reshape(shape) if x.size else x
        close(ops.nuslerp_columns(a, b, weight=weight, like=like), columns, xs, 10)


def test_nuslerp_edges() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(ops.nuslerp(a, b, weight=[1, 0]), a)  # not read at all
    close(ops.nuslerp(a, -a, weight=[3, 1]), np.array([1.5, 0.0]), [a])  # opposite: the straight line
    close(ops.nuslerp(a, torch.zeros(2)), a.numpy() * math.sqrt(0.5), [a])  # zero: orthogonal
    close(ops.nuslerp(a, b), np.array([3.0, 1.0]) * math.sqrt(0.5), [a])
    with pytest.raises(ValueError, match="nuslerp_columns"):
        ops.nuslerp(a, b, flatten=False, row_wise=True)
    assert torch.equal(ops.nuslerp(a, b, row_wise=True), ops.nuslerp(a, b))
    for op in (ops.nuslerp, ops.nuslerp_columns):
        with pytest.raises(ValueError, match="sum to zero"):
            op(a, b, weight=[2, -2])


def test_columns_of_tensors_with_many_axes() -> None:
    """All vectors along the first axis."""
    a, b = make("float64", (3, 2, 4), 2)
    made = ops.nuslerp_columns(a, b, weight=[0.6, 0.4])
    for i in range(2):
        for j in range(4):
            close(made[:, i, j], arc(a[:, i, j].numpy(), b[:, i, j].numpy(), 0.4), [a])


def multislerp(xs: list[np.ndarray], weight: list[float], eps: float = 1e-8) -> np.ndarray:
    """By way of the tangent space, as the method is described."""
    norms = [norm(x) for x in xs]
    units = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weight, units, strict=True))
    if norm(mean) < max(eps, 1e-6 * sum(weight)):
        return sum(w * x for w, x in zip(weight, xs, strict=True))
    m = mean / norm(mean)
    tangent = sum(w * (u - float((u * m).sum()) * m) for w, u in zip(weight, units, strict=True))
    n = norm(tangent) + eps
    point = m * math.cos(n) + tangent * (math.sin(n) / n)
    return point * sum(w * v for w, v in zip(weight, norms, strict=True))


@everywhere
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"small"}))  # 1e-30 is below eps: see below
def test_multislerp(kind: str, shape: tuple[int, ...]) -> None:
    for weight in ([1, 1], [0.5, 0.3, 0.9], [2, 0, 1, 1]):
        xs = make(kind, shape, len(weight))
        for normalize in (True, False):
            share = [w / sum(weight) for w in weight] if normalize else weight
            made = ops.multislerp(*xs, weight=weight, normalize=normalize)
            close(made, multislerp(exact(xs), share), xs, 20 * sum(weight))


def test_multislerp_edges() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(ops.multislerp(a, weight=0.2), a)
    assert torch.equal(ops.multislerp(a, -a), torch.zeros(2))
    assert ops.multislerp(a, -a, b, b, weight=[1, 1, 1, -1], normalize=False).tolist() == [0.0, 0.0]
    close(ops.multislerp(a * 1e-30, b * 1e-30), np.array([1.5e-30, 0.5e-30]), [a * 1e-30])  # shorter than eps: the line
    with pytest.raises(ValueError, match="sum to zero"):
        ops.multislerp(a, b, weight=[1, -1])


def karcher(xs: list[np.ndarray], weight: list[float], max_iter: int, tol: float) -> np.ndarray:
    share = [w / sum(weight) for w in weight]
    norms = [norm(x) for x in xs]
    known = [(w, x / n) for w, x, n in zip(share, xs, norms, strict=True) if n and w]
    if not known:
        return np.zeros_like(xs[0])
    mass = sum(w for w, _ in known)
    known = [(w / mass, u) for w, u in known]
    m = sum(w * u for w, u in known)
    m = m / norm(m) if norm(m) > max(tol, 1e-12) else known[0][1]
    for _ in range(max_iter):
        v = np.zeros_like(m)
        for w, u in known:
            cosine = min(1.0, max(-1.0, float((m * u).sum())))
            theta = math.acos(cosine)
            if theta >= tol and math.sin(theta) > 1e-7:
                v = v + w * theta / math.sin(theta) * (u - cosine * m)
        if norm(v) < max(tol, 1e-15):
            break
        m = math.cos(norm(v)) * m + math.sin(norm(v)) * v / norm(v)
        m = m / norm(m)
    return m * sum(w * n for w, n in zip(share, norms, strict=True))


@everywhere
@everything
def test_karcher(kind: str, shape: tuple[int, ...]) -> None:
    for weight in ([1, 1], [0.5, 0.3, 0.9], [2, 0, 1, 1]):
        xs = make(kind, shape, len(weight))
        signs = {tuple(np.sign(x.reshape(-1).tolist())) for x in xs}
        if math.prod(shape) == 1 and len(signs) > 1:
            continue  # opposite: where a search would end is a matter of rounding; see the edges
        close(ops.karcher(*xs, weight=weight), karcher(exact(xs), weight, 10, 1e-5), xs, 50)


def test_karcher_edges() -> None:
    a, b = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(ops.karcher(a), a)
    assert torch.equal(ops.karcher(a, torch.zeros(2).double()), a / 2)  # a zero vector has a norm, no direction
    assert torch.equal(ops.karcher(torch.zeros(2), torch.zeros(2)), torch.zeros(2))
    close(ops.karcher(a, -a), a.numpy(), [a])  # opposite: the first
    close(ops.karcher(a, b), np.full(2, 2.0) * math.sqrt(0.5), [a])
    for wrong in ([0, 0], 0):
        with pytest.raises(ValueError, match="sum to zero"):
            ops.karcher(a, b, weight=wrong)


def test_karcher_is_where_no_force_is_left() -> None:
    xs = make("float64", (200,), 5)
    made = ops.karcher(*xs, max_iter=200, tol=1e-14).numpy()
    m = made / norm(made)
    force = np.zeros_like(m)
    for x in exact(xs):
        cosine = float((m * x).sum()) / norm(x)
        force += math.acos(cosine) / math.sqrt(1 - cosine**2) * (x / norm(x) - cosine * m)
    assert norm(force) < 1e-12
    assert norm(made) == pytest.approx(np.mean([norm(x) for x in exact(xs)]))


@given(st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=2, max_size=5), st.floats(0.01, 100))
def test_means_of_directions_scale_and_keep_what_is_common(vectors: list[list[float]], scale: float) -> None:
    """Scaling the inputs scales the result; equal inputs are their own mean."""
    xs = [torch.tensor(v, dtype=torch.float64) + torch.tensor([9.0, 0, 0, 0]) for v in vectors]  # all in a half space
    for op in (ops.karcher, ops.multislerp):
        close(op(*[x * scale for x in xs]), (op(*xs) * scale).numpy(), xs, 1e5 * scale)
        close(op(*[xs[0]] * 3), xs[0].numpy(), xs, 1e5)


@pytest.mark.parametrize("name", ["nuslerp", "nuslerp_columns", "multislerp", "karcher", "geometric_median"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_streamed(tmp_path: Any, name: str, shape: tuple[int, ...], params: dict[str, Any] = {}) -> None:  # noqa: B006
    found, wanted = streamed(tmp_path, name, normal(shape, 2 if name.startswith("nuslerp") else 3), **params)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", list(LARGE.values())[:2], ids=list(LARGE)[:2])
def test_rows_streamed(tmp_path: Any, shape: tuple[int, ...]) -> None:
    test_streamed(tmp_path, "nuslerp", shape, {"flatten": False})
