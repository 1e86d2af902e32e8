"""Operators that must see rows or whole tensors, as another package would register them."""

import numpy as np
import pytest
from helpers import write_file

import surgery
from surgery.engine.pieces import PIECE
from surgery.ops.declare import pointwise, registry, takes


@pytest.fixture
def operators():
    """One operator per locality; each result depends on everything it is promised to see at once."""

    @pointwise("test_rows", takes=takes("x", space="same"), gives="first", locality="rows")
    def rows(tensors):
        """Subtract each row's mean."""
        (x,) = tensors
        return x - x.mean(dim=1, keepdim=True)

    @pointwise("test_matrix", takes=takes("x", space="same"), gives="first", locality="matrix")
    def matrix(tensors):
        """Reverse both axes."""
        (x,) = tensors
        return x.flip(tuple(range(x.ndim)))

    yield {"rows": rows, "matrix": matrix}
    del registry["test_rows"], registry["test_matrix"]


SHAPES = {
    "small": (5, 7),
    "several pieces": (PIECE // 1000 + 50, 1000),
    "row longer than a piece": (2, PIECE + 3),
    "vector longer than a piece": (PIECE + 5,),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("locality", ["rows", "matrix"])
def test_streams_what_it_computes_in_memory(tmp_path, operators, locality, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    write_file(tmp_path / "m" / "model.safetensors", {"w": x})
    made = operators[locality](surgery.open(tmp_path / "m"))
    made.save(tmp_path / "out", threads=2)
    found = surgery.open(tmp_path / "out")["w"].compute().numpy()
    if locality == "matrix":
        np.testing.assert_array_equal(found, x[tuple([slice(None, None, -1)] * x.ndim)])
    else:
        wanted = x.astype(np.float64) - x.astype(np.float64).mean(axis=-1, keepdims=True)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_an_aborted_run_leaves_no_statistic_behind(tmp_path):
    """A statistic counts only once it is concluded: what a refused run had begun must not serve the next one."""
    good = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    bad = good.copy()
    bad[5, 5] = np.nan
    write_file(tmp_path / "a" / "model.safetensors", {"v": good, "w": bad})
    write_file(tmp_path / "b" / "model.safetensors", {"v": good * 2, "w": good * 3})
    made = surgery.ops.slerp(surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b"), t=0.5)
    with pytest.raises(surgery.Refused, match="NaN"):
        made.save(tmp_path / "out")
    np.testing.assert_allclose(made["v"].compute().numpy(), good * 1.5, rtol=1e-5)
