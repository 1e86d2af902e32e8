"""What every lossy codec promises: true errors, exact sizes, random access, determinism, refusals. Against hostile input too."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery.delta.lossy  # noqa: F401
from surgery.delta.codecs.base import LOSSY, Coded, lossy_codec
from surgery.errors import Refused

# codec, options; every codec at least once
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dither", {"bits": 1.0}),
    ("dither", {"bits": 0.25}),
    ("dither", {"step": 3e-5}),
    ("dither", {"max_error": 1e-5, "seed": 7}),
    ("svd_wf", {"bits": 1.0}),
    ("svd_wf", {"step": 1e-4}),
    ("dare", {"drop": 0.9}),
    ("dare", {"drop": 0.0, "levels": 8}),
    ("sign", {}),
    ("sign", {"scale": "l2", "per": "tensor"}),
    ("ternary", {"density": 0.2}),
    ("ternary", {"density": 0.05, "per": "row", "scale": "l2"}),
    ("group", {"bits": 2}),
    ("group", {"bits": 3, "group": 48}),
    ("group", {"bits": 4, "scale": "l2"}),
    ("group", {"bits": 8, "group": 4}),
    ("nf4", {}),
    ("lowrank", {"rank": 5}),
    ("lowrank", {"bits": 1.0, "factors": "int8"}),
    ("delta_come", {"bits": 1.0}),
    ("delta_come", {"plan": [[8, 2], [3, 5], [2, 9], [1, 3]], "group": 32}),
    ("sparse24", {}),
    ("sparse24", {"bits": 2, "group": 16}),
    ("sparse", {"density": 0.1}),
    ("sparse", {"values": "bfloat16"}),
    ("hybrid", {}),
    ("hybrid", {"stages": [{"codec": "lowrank", "rank": 2}, {"codec": "dither", "bits": 0.5}]}),
    ("loftq", {"rank": 4, "rounds": 2}),
    ("quantile", {}),
    ("quantile", {"bits": 3, "criterion": "l1"}),
    ("plain", {}),
    ("plain", {"values": "bfloat16"}),
    ("round", {"bits": 1.0}),
    ("round", {"step": 1e-4, "scale": "l2"}),
    ("hadamard", {}),
    ("hadamard", {"bits": 1, "scale": "l2"}),
    ("hadamard", {"bits": 7}),
    ("hadamard", {"bits": 3, "signs": False}),
    ("columns", {"count": 3}),
    ("columns", {"share": 0.1, "quantiser": {"codec": "round", "bits": 1.0}}),
    ("two_level", {}),
    ("vq", {"width": 6}),
    ("vq", {"dims": 3, "width": 4, "books": 2, "scale": "l2"}),
    ("two_level", {"bits": 2, "group": 24, "scale": "l2"}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}"[:60] for name, options in CASES]
MATRIX_ONLY = {"svd_wf", "lowrank", "delta_come", "loftq", "hybrid", "columns"}  # hybrid by its default stages
every = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def heavy(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Heavy-tailed, with rows of different scale, a few directions that dominate, one row and some elements of zeros."""
    rng = np.random.default_rng(seed)
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    x = rng.standard_t(4, (rows, columns)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
    x += 3 * rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
    x *= rng.random((rows, columns)) > 0.1
    x[rows // 2] = 0
    return (1e-4 * x).astype(np.float32).reshape(shape)


def whole(codec: Any, coded: Coded, shape: tuple[int, ...], key: str = "t") -> np.ndarray:
    return codec.decode(coded, shape, key, 0, int(np.prod(shape))).reshape(shape)


def on_disk(coded: Coded) -> Coded:
    """As a package hands it back: facts through JSON, parts as memory views."""
    return Coded({n: memoryview(p) for n, p in coded.parts.items()}, json.loads(json.dumps(dict(coded.facts), allow_nan=False)))


@pytest.fixture(scope="module")
def delta() -> np.ndarray:
    return heavy((96, 80))


def test_every_codec_is_covered() -> None:
    assert {name for name, _ in CASES} == {name.partition("/")[0] for name in LOSSY} - {"sum"}  # of coded ones: test_sums


@every
def test_facts_are_true(name: str, options: dict, delta: np.ndarray) -> None:
    codec = lossy_codec(name)
    coded = codec.encode(delta, key="t", **options)
    made = whole(codec, on_disk(coded), delta.shape).astype(np.float64)
    d, e = delta.astype(np.float64), made - delta
    error = coded.facts["error"]
    assert coded.facts["bits"] == 8 * sum(map(len, coded.parts.values())) / delta.size
    assert error["max_abs"] == np.abs(e).max()
    assert error["rel_fro"] == pytest.approx(np.linalg.norm(e) / np.linalg.norm(d), rel=1e-9)
    assert error["gain"] == pytest.approx((made * d).sum() / (d * d).sum(), rel=1e-9)
    if "bound" in error:
        assert error["max_abs"] <= error["bound"]
    if "bits" in options and name in ("dither", "round", "svd_wf", "lowrank", "delta_come"):
        assert 0.85 * options["bits"] <= coded.facts["bits"] <= options["bits"]


@every
def test_any_range_is_the_same_as_the_whole(name: str, options: dict, delta: np.ndarray) -> None:
    codec = lossy_codec(name)
    coded = codec.encode(delta, key="t", **options)
    made = whole(codec, coded, delta.shape).reshape(-1)
    assert made.dtype == np.float32
    for a, b in [(0, 1), (3, 4), (79, 81), (80, 160), (77, 500), (7000, 7680), (7679, 7680), (5, 5), (0, 0)]:
        np.testing.assert_array_equal(codec.decode(coded, delta.shape, "t", a, b), made[a:b])


@every
def test_layout_and_history_do_not_matter(name: str, options: dict, delta: np.ndarray) -> None:
    codec = lossy_codec(name)
    coded = codec.encode(delta, key="t", **options)
    wide = np.zeros((delta.shape[0], 2 * delta.shape[1]), np.float32)
    wide[:, ::2] = delta
    for same in (np.asfortranarray(delta), wide[:, ::2], delta.astype(np.float64), delta.copy()):
        before = same.copy()
        again = codec.encode(same, key="t", **options)
        assert dict(again.parts) == dict(coded.parts) and again.facts == coded.facts
        np.testing.assert_array_equal(same, before)


@every
@pytest.mark.parametrize("kind", ["zeros", "constant", "tiny", "huge", "subnormal", "one_outlier", "row", "column", "one"])
def test_extreme_matrices(name: str, options: dict, kind: str) -> None:
    rng = np.random.default_rng(1)
    x = {
        "zeros": np.zeros((12, 10)),
        "constant": np.full((12, 10), -0.25),
        "tiny": 1e-30 * rng.standard_normal((12, 10)),
        "huge": 1e34 * rng.standard_normal((12, 10)),
        "subnormal": 1e-41 * rng.standard_normal((12, 10)),
        "one_outlier": np.where(np.arange(120).reshape(12, 10) == 57, 1e3, 1e-6 * rng.standard_normal((12, 10))),
        "row": rng.standard_normal((1, 10)),
        "column": rng.standard_normal((10, 1)),
        "one": np.array([[3.5]]),
    }[kind].astype(np.float32)
    scaled = {k: v * max(float(np.abs(x).max()), 1e-30) * 1e3 for k, v in options.items() if k in ("step", "max_error")}
    codec = lossy_codec(name)
    coded = codec.encode(x, key="t", **{**options, **scaled})
    made = whole(codec, on_disk(coded), x.shape)
    assert np.isfinite(made).all()
    assert coded.facts["error"]["max_abs"] == np.abs(made.astype(np.float64) - x).max()
    if kind == "zeros":
        assert not made.any() and coded.facts["error"]["rel_fro"] == 0.0


@every
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (7,), (3, 5, 7), (4, 3, 2, 2), (2, 1, 1, 3, 2)], ids=str)
def test_shapes(name: str, options: dict, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * np.float32(1e-4)
    codec = lossy_codec(name)
    if len(shape) < 2 and 0 not in shape and name in MATRIX_ONLY and "stages" not in str(options):
        with pytest.raises(Refused, match="codes matrices"):
            codec.encode(x, key="t", **options)
        return
    if len(shape) < 2 and name == "hybrid" and 0 not in shape:
        with pytest.raises(Refused):
            codec.encode(x, key="t", **options)
        return
    coded = codec.encode(x, key="t", **options)
    assert whole(codec, on_disk(coded), shape).shape == shape


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_refused(name: str, options: dict, bad: float) -> None:
    x = np.ones((4, 6))
    x[2, 3] = bad
    with pytest.raises(Refused, match=r"`layer\.w` has values that are not finite"):
        lossy_codec(name).encode(x, key="layer.w", **options)


@every
def test_damage_is_refused_or_harmless(name: str, options: dict, delta: np.ndarray) -> None:
    """Truncation is always refused. A flipped bit is refused, or decodes to a tensor of the right size: never anything else."""
    codec = lossy_codec(name)
    coded = codec.encode(delta, key="t", **options)
    for part, payload in coded.parts.items():
        for wrong in (payload[:-1], payload + b"\0", b""):
            with pytest.raises(Refused, match="damaged"):
                whole(codec, Coded({**coded.parts, part: wrong}, coded.facts), delta.shape)
        if len(coded.parts) > 1:
            with pytest.raises(Refused):
                whole(codec, Coded({n: p for n, p in coded.parts.items() if n != part}, coded.facts), delta.shape)
        rng = np.random.default_rng(3)
        for at in rng.integers(0, 8 * len(payload), 12):
            flipped = bytearray(payload)
            flipped[at // 8] ^= 1 << (at % 8)
            try:
                made = whole(codec, Coded({**coded.parts, part: bytes(flipped)}, coded.facts), delta.shape)
            except Refused:
                continue
            assert made.shape == delta.shape


@every
def test_lying_facts_are_refused_or_harmless(name: str, options: dict, delta: np.ndarray) -> None:
    codec = lossy_codec(name)
    coded = codec.encode(delta, key="t", **options)
    for key in set(coded.facts) - {"bits", "error"}:
        for lie in (None, -1, 10**12, "x", [], [[1, 10**9]], {}, float("nan")):
            if key == "step" and lie == 10**12 and name != "dither":
                continue
            try:
                made = whole(codec, Coded(coded.parts, {**coded.facts, key: lie}), delta.shape)
            except Refused:
                continue
            assert made.shape == delta.shape
    with pytest.raises(Refused):
        whole(codec, coded, (960, 80))  # a shape that it was not made from


@every
def test_unknown_options_are_refused(name: str, options: dict) -> None:
    with pytest.raises(Refused, match="no option `bitz`"):
        lossy_codec(name).encode(np.ones((4, 4)), key="t", bitz=3, **options)


@pytest.mark.parametrize("name", ["group", "sparse24", "quantile", "hadamard", "two_level"])
def test_numbers_of_bits_may_come_as_floats(name: str, delta: np.ndarray) -> None:
    """As `--bits 2` does."""
    one, two = (lossy_codec(name).encode(delta, key="t", bits=bits) for bits in (2, 2.0))
    assert one.parts == two.parts and one.facts == two.facts


@pytest.mark.parametrize("name", ["dither", "svd_wf", "lowrank", "delta_come"])
def test_exactly_one_budget(name: str) -> None:
    with pytest.raises(Refused, match="exactly one of"):
        lossy_codec(name).encode(np.ones((4, 4)), key="t")


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    scale=st.floats(1e-12, 1e6),
    error=st.floats(1e-4, 10),
    seed=st.integers(0, 99),
)
def test_dither_bound_holds(rows: int, columns: int, scale: float, error: float, seed: int) -> None:
    """|d' - d| <= max_error for every element: the promise of a bounded package."""
    x = (scale * np.random.default_rng(seed).standard_t(3, (rows, columns))).astype(np.float32)
    codec, limit = lossy_codec("dither"), scale * error
    coded = codec.encode(x, key=str(seed), max_error=limit, seed=seed)
    made = whole(codec, coded, x.shape, str(seed)).astype(np.float64)
    assert np.abs(made - x).max() <= limit
    assert coded.facts["error"]["bound"] <= limit * (1 + 1e-12)


UNBIASED_SCALE = {"sign", "ternary", "group", "nf4", "sparse24", "hadamard", "two_level", "vq"}  # with `scale: gain`, the default


@given(
    case=st.sampled_from([c for c in CASES if c[0] != "loftq"]),
    rows=st.integers(1, 24),
    columns=st.integers(1, 40),
    scale=st.floats(1e-6, 1e3),
    zeros=st.sampled_from([0.0, 0.5, 0.98]),
    seed=st.integers(0, 10**6),
)
def test_what_is_stated_is_true(case: Any, rows: int, columns: int, scale: float, zeros: float, seed: int) -> None:
    """Error, gain, bound and size of every codec, for deltas of any shape and scale, dense to almost empty."""
    name, options = case
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_t(3, (rows, columns)) * (rng.random((rows, columns)) >= zeros)
    x = x.astype(np.float32)
    options = {k: v * scale * 1e4 if k in ("step", "max_error") else v for k, v in options.items()}
    codec = lossy_codec(name)
    coded = codec.encode(x, key="t", **options)
    made, d = whole(codec, on_disk(coded), x.shape).astype(np.float64), x.astype(np.float64)
    error, e = coded.facts["error"], made - d
    assert error["max_abs"] == np.abs(e).max() <= error.get("bound", np.inf)
    assert coded.facts["bits"] == 8 * sum(map(len, coded.parts.values())) / x.size
    if d.any():
        assert error["rel_fro"] == pytest.approx(np.linalg.norm(e) / np.linalg.norm(d), rel=1e-6, abs=1e-12)
        gain = float((made * d).sum() / (d * d).sum())
        assert error["gain"] == pytest.approx(gain, rel=1e-6, abs=1e-9)
        if name in UNBIASED_SCALE and options.get("scale") != "l2" and made.any():
            assert gain == pytest.approx(1.0, abs=2e-3)
    else:
        assert not made.any()


def test_large_tensor_has_several_chunks_and_bounded_lanes() -> None:
    x = heavy((1100, 1024))
    codec = lossy_codec("dither")
    coded = codec.encode(x, key="t", bits=1.0)
    assert len(coded.facts["chunks"]) == 3  # of 512 rows
    made = whole(codec, coded, x.shape).reshape(-1)
    for a, b in [(524287, 524289), (1048576 - 5, 1048576 + 5), (600000, 600001)]:
        np.testing.assert_array_equal(codec.decode(coded, x.shape, "t", a, b), made[a:b])
    long = np.random.default_rng(0).standard_normal((2, 600_000)).astype(np.float32)  # rows longer than a chunk
    coded = codec.encode(long, key="t", step=2.0)
    made = whole(codec, coded, long.shape).reshape(-1)
    assert len(coded.facts["chunks"]) == 4
    np.testing.assert_array_equal(codec.decode(coded, long.shape, "t", 524_200, 700_000), made[524_200:700_000])


def golden_delta() -> np.ndarray:
    i = np.arange(24 * 20)
    x = ((i * 2654435761) % 4093 - 2046) * np.where(i % 7 == 3, 4.0, 1.0) + 30.0 * ((i // 20) % 5) * ((i % 20) % 3 - 1)
    return (x * 2.0**-22).astype(np.float32).reshape(24, 20)


def golden() -> list[dict[str, Any]]:
    """What tests/delta/golden_lossy.json is made from; only ever extended, with new codecs or versions."""
    file = Path(__file__).parent / "golden_lossy.json"
    made = json.loads(file.read_text()) if file.exists() else []
    kept = [(one["codec"].partition("/")[0], one["options"]) for one in made]
    for name, options in CASES:
        if (name, options) in kept:
            continue
        codec = lossy_codec(name)
        coded = codec.encode(golden_delta(), key="t", **options)
        parts = {n: b64encode(p).decode() for n, p in coded.parts.items()}
        digest = hashlib.sha256(whole(codec, coded, (24, 20)).tobytes()).hexdigest()
        made.append({"codec": codec.name, "options": options, "parts": parts, "facts": dict(coded.facts), "sha256": digest})
    return made


def test_stored_bytes_decode_to_the_same_bits_for_ever() -> None:
    """Reconstruction is part of the format: whoever changes these needs a new version in the codec's name."""
    kept = json.loads((Path(__file__).parent / "golden_lossy.json").read_text())
    assert {k["codec"] for k in kept} == set(LOSSY) - {"sum/1"}
    for one in kept:
        coded = Coded({n: b64decode(p) for n, p in one["parts"].items()}, one["facts"])
        made = whole(LOSSY[one["codec"]], coded, (24, 20))
        assert hashlib.sha256(made.tobytes()).hexdigest() == one["sha256"], one["codec"]
        error = np.abs(made.astype(np.float64) - golden_delta()).max()
        assert error == one["facts"]["error"]["max_abs"]


def test_sums() -> None:
    """Coded deltas side by side are what they decode to, weighted and added in float32; sums of sums are flat."""
    from surgery.delta.lossy.summed import Term, joined, split

    x, y = heavy((96, 80)), heavy((96, 80), 1)
    one, other = lossy_codec("dither").encode(x, key="t", bits=1.0), lossy_codec("sign").encode(y, key="t")
    first = joined([Term("dither/1", "t", 0.5, one), Term("sign/1", "t", 1.0, other)])
    both = joined([Term("sum/1", "t", 1.0, first), Term("dither/1", "t", -2.0, one)])
    assert [t.weight for t in split(both)] == [0.5, 1.0, -2.0]
    a, b = whole(lossy_codec("dither"), one, x.shape), whole(lossy_codec("sign"), other, x.shape)
    wanted = (a * np.float32(0.5) + b) + a * np.float32(-2.0)
    np.testing.assert_array_equal(whole(LOSSY["sum/1"], on_disk(both), x.shape), wanted)
    np.testing.assert_array_equal(LOSSY["sum/1"].decode(both, x.shape, "t", 500, 900), wanted.reshape(-1)[500:900])


if __name__ == "__main__":
    (Path(__file__).parent / "golden_lossy.json").write_text(json.dumps(golden(), indent=1) + "\n")
