"""Vector quantisation against its formula in float64: codebooks, nearest words, feedback, a low-rank part beside it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from test_lossy_codecs import heavy
from test_lossy_inputs import coded, delta, gram, output_error

from surgery.delta.codecs.base import Coded
from surgery.delta.lossy.inputs import Inputs


def opened(made: Coded, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(books, indices (rows, vectors, books), scales) from the payloads."""
    facts, (rows, length) = made.facts, shape
    dims, width, words, many = facts["dims"], facts["width"], facts["words"], len(facts["units"])
    raw = np.frombuffer(made.parts["books"], np.int8).reshape(many, words, dims).astype(np.float64)
    books = raw * np.array(facts["units"])[:, None, None]
    count = rows * -(-length // dims) * many
    bits = np.unpackbits(np.frombuffer(made.parts["codes"], np.uint8), bitorder="little")[: count * width]
    index = (bits.reshape(count, width) @ (1 << np.arange(width))).reshape(rows, -1, many)
    scales = np.frombuffer(made.parts["scales"], "<f2").astype(np.float64) * 2.0 ** facts["exponent"] * facts["factor"]
    return books, index, scales


@pytest.mark.parametrize("dims,width,books", [(4, 5, 1), (3, 4, 2), (8, 6, 3), (1, 3, 1)])
def test_what_is_stored_is_what_is_decoded(dims: int, width: int, books: int) -> None:
    x = heavy((40, 50), 2)
    made, back = coded("vq", x, None, dims=dims, width=width, books=books)
    words, index, scales = opened(made, x.shape)
    total = sum(words[b][index[:, :, b]] for b in range(books)).reshape(40, -1)[:, :50] * scales[:, None]
    np.testing.assert_allclose(back, total, rtol=1e-6, atol=1e-12)
    count = -(-50 // dims) * 40
    assert made.facts["bits"] == 8 * (-(-count * books * width // 8) + books * 2**width * dims + 80) / x.size


def test_every_vector_has_the_nearest_word() -> None:
    x = heavy((40, 50), 2)
    made, back = coded("vq", x, None, dims=5, width=6, scale="l2")
    words, index, scales = opened(made, x.shape)
    scales = scales / made.facts["factor"]
    for row in range(40):
        for v in range(10):
            if scales[row] == 0:
                assert not back[row].any()
                continue
            wanted = x[row, 5 * v : 5 * v + 5].astype(np.float64) / scales[row]
            distance = np.linalg.norm(words[0] - wanted, axis=1)
            assert distance[index[row, v, 0]] <= distance.min() * (1 + 1e-4) + 1e-6


def test_codebooks_learn_what_scalars_cannot() -> None:
    """Vectors from few clusters: an index of four bits says all but the noise. And normal numbers: below rounding one by one."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((16, 4))
    x = (centres[rng.integers(0, 16, (64, 32))] + 0.02 * rng.standard_normal((64, 32, 4))).reshape(64, 128)
    made, _ = coded("vq", x.astype(np.float32), None, dims=4, width=4, seed=3)
    assert made.facts["error"]["rel_fro"] < 0.35  # k-means may join two of them; a grid of one bit leaves 0.6
    normal = rng.standard_normal((256, 512)).astype(np.float32)
    vectors = coded("vq", normal, None, scale="l2")[0].facts
    scalars = coded("group", normal, None, bits=2, group=128, scale="l2")[0].facts
    assert vectors["bits"] < scalars["bits"] + 0.03 and vectors["error"]["rel_fro"] < 0.94 * scalars["error"]["rel_fro"]


def test_more_books_leave_less() -> None:
    x = heavy((64, 64), 7)
    errors = [coded("vq", x, None, width=4, books=n, scale="l2")[0].facts["error"]["rel_fro"] for n in (1, 2, 3, 4)]
    assert all(b < 0.8 * a for a, b in pairwise(errors))


@pytest.mark.parametrize("dims,width,books", [(2, 4, 1), (4, 4, 2)])
def test_feedback_over_vectors(dims: int, width: int, books: int) -> None:
    h, d = gram(70), delta(66, 70)
    how = {"dims": dims, "width": width, "books": books}
    blind = output_error(h, d, coded("vq", d, None, **how)[1])
    for axis in (1, 0):
        x = d if axis == 1 else np.ascontiguousarray(d.T)
        made, back = coded("vq", x, Inputs(h, axis=axis), **how)
        found = output_error(h, d, back if axis == 1 else back.T)
        assert found < 0.6 * blind
        assert made.facts["error"]["output"] == pytest.approx(found, rel=1e-6)


def test_white_inputs_change_nothing_but_the_factor() -> None:
    d = delta(20, 32)
    one = coded("vq", d, None, width=4)[0]
    other = coded("vq", d, Inputs(np.eye(32)), width=4)[0]
    assert one.parts["codes"] == other.parts["codes"]


def test_beside_a_low_rank_part() -> None:
    """ReALLM's form: what the low-rank part leaves goes to the codebooks."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((96, 128)) + 4 * rng.standard_normal((96, 3)) @ rng.standard_normal((3, 128))).astype(np.float32)
    vq = {"codec": "vq", "dims": 2, "width": 4, "scale": "l2"}
    alone = coded("vq", x, None, dims=2, width=4, scale="l2")[0].facts["error"]["rel_fro"]
    assert coded("loftq", x, None, rank=3, quantiser=vq)[0].facts["error"]["rel_fro"] < 0.5 * alone
