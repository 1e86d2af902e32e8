"""Grafts, resets and intruder dimensions against their definitions in numpy float64, in memory and streamed from files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    BF16,
    bits,
    llama_config,
    llama_tensors,
    plan,
    read_checkpoint,
    recipe,
    run,
    same,
    write_checkpoint,
    write_file,
)
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.engine.pieces import PIECE
from surgery.errors import Refused
from surgery.graph.expr import Read, walk
from surgery.ops import graft, reset_elements, tame_intruders
from surgery.ops.intruders import Directions
from surgery.ops.reset import half_of, half_of_blocks

SHAPES: dict[str, tuple[int, ...]] = {
    "a.first": (3,),
    "b": (700, 1000),
    "c": (30, 40, 5),
    "long": (PIECE + 77,),
    "s": (),
    "none": (0, 4),
}


def grafted(tuned: list[np.ndarray], base: list[np.ndarray], share: float, threshold: float = 0.0) -> list[np.ndarray]:
    """The definition: all elements in one stable order by |tuned - base|, descending."""
    a, b = (np.concatenate([x.reshape(-1) for x in xs]) for xs in (tuned, base))
    size = np.abs(a.astype(np.float64) - b.astype(np.float64))
    keep = max(1, int(share * len(a))) if share > 0 and len(a) else 0
    taken = np.zeros(len(a), bool)
    taken[np.argsort(-size, kind="stable")[:keep]] = True
    if threshold > 0:
        taken &= size > threshold
    out, made, at = np.where(taken, a, b), [], 0
    for x in tuned:
        made.append(out[at : at + x.size].reshape(x.shape))
        at += x.size
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Base and tuned in bfloat16: deltas have few distinct sizes, so that the cut falls among equal ones."""
    folder, rng = tmp_path_factory.mktemp("graft"), np.random.default_rng(0)
    base = {n: np.asarray(rng.standard_normal(s) * 0.1).astype(BF16) for n, s in SHAPES.items()}
    tuned = {n: np.asarray(x.astype(np.float32) + rng.standard_normal(x.shape) * 0.003).astype(BF16) for n, x in base.items()}
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "tuned", tuned)
    return folder, tuned, base


def step(folder: Path, text: str, out: Path, threads: int = 2) -> dict[str, np.ndarray]:
    path = recipe(folder, f"out: {text}", models=("base", "tuned"))
    run(path, out, threads=threads)
    return read_checkpoint(out)


# -- graft ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "threshold"), [(0.05, 0.0), (0.5, 0.0), (1e-9, 0.0), (0.3, 0.004), (1.0, 0.004), (1.0, 0.0), (0.0, 0.0)]
)
def test_graft_over_the_whole_model(pair: Any, tmp_path: Path, share: float, threshold: float) -> None:
    folder, tuned, base = pair
    found = step(folder, f"{{op: graft, of: [tuned, base], share: {share}, threshold: {threshold}}}", tmp_path / "out")
    expected = grafted([tuned[n] for n in SHAPES], [base[n] for n in SHAPES], share, threshold)
    for name, x in zip(SHAPES, expected, strict=True):
        assert bits(found[name]) == bits(x.astype(BF16)), name
    taken = sum(int((found[n] != base[n]).sum()) for n in SHAPES)
    if 0 < share < 0.5 and not threshold:
        assert taken == max(1, int(share * sum(math.prod(s) for s in SHAPES.values())))


def test_graft_does_not_depend_on_threads(pair: Any, tmp_path: Path) -> None:
    folder, _, _ = pair
    text = "{op: graft, of: [tuned, base], share: 0.2}"
    same(step(folder, text, tmp_path / "one", threads=1), step(folder, text, tmp_path / "three", threads=3))


def test_graft_leaves_tensors_out_of_the_count_by_name(pair: Any, tmp_path: Path) -> None:
    folder, tuned, base = pair
    found = step(folder, '{op: graft, of: [tuned, base], share: {"b": 0, "long": 1, "*": 0.1}}', tmp_path / "out")
    rest = [n for n in SHAPES if n not in ("b", "long")]
    expected = grafted([tuned[n] for n in rest], [base[n] for n in rest], 0.1)
    for name, x in {**dict(zip(rest, expected, strict=True)), "b": base["b"], "long": tuned["long"]}.items():
        assert bits(found[name]) == bits(x.astype(BF16)), name
    path = recipe(folder, 'out: {op: graft, of: [tuned, base], share: {"b": 0, "long": 1, "*": 0.1}}', models=("base", "tuned"))
    programs = {p.name: {e.source.label for e in walk([p.expr]) if isinstance(e, Read)} for p in plan(path).programs}
    assert programs["b"] == {"base"} and programs["long"] == {"tuned"} and programs["c"] == {"base", "tuned"}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (5, 3), (4, 0), (2, 5, 3)], ids=str)
def test_graft_in_memory(shape: tuple[int, ...], kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    tuned, base = ((torch.randn(shape, generator=g, dtype=torch.float64) * 2).round().to(kind) / 2 for _ in range(2))  # ties
    for share in (0.0, 0.01, 0.4, 1.0):
        for threshold in (0.0, 0.6):
            made = graft(tuned, base, share=share, threshold=threshold)
            (expected,) = grafted([tuned.double().numpy()], [base.double().numpy()], share, threshold)
            np.testing.assert_array_equal(made.double().numpy(), expected)


def test_graft_per_tensor_is_not_global(pair: Any, tmp_path: Path) -> None:
    folder, tuned, base = pair
    found = step(folder, "{op: graft, of: [tuned, base], share: 0.1, scope: tensor}", tmp_path / "out")
    for name in SHAPES:
        (expected,) = grafted([tuned[name]], [base[name]], 0.1)
        assert bits(found[name]) == bits(expected.astype(BF16)), name


@pytest.mark.parametrize("text", ["{op: graft, of: [tuned, base], threshold: 0.5}", "{op: graft, of: [tuned, base], share: 0.5}",
                                  "{op: reset_elements, of: [tuned, base]}"])  # fmt: skip
@pytest.mark.parametrize("where", ["tuned", "base"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_not_chosen_away(tmp_path: Path, text: str, where: str, value: float) -> None:
    for name in ("base", "tuned"):
        x = np.ones((4, 40), np.float32)
        if name == where:
            x[1, :20] = value
        write_file(tmp_path / name / "model.safetensors", {"w": x})
    with pytest.raises(Refused, match=rf"{where}: `w` holds (NaN|infinity)"):
        step(tmp_path, text, tmp_path / "out")


def test_deltas_are_refused(pair: Any, tmp_path: Path) -> None:
    folder, _, _ = pair
    for op in ("graft", "reset_elements", "tame_intruders", "reset"):
        path = recipe(folder, f"d: {{op: diff, of: [tuned, base]}}\nout: {{op: {op}, of: [d, base]}}", models=("base", "tuned"))
        with pytest.raises(Refused, match=r"takes weights.*`d` is a delta"):
            plan(path)


# -- reset: elements -----------------------------------------------------------------------------------------------------


def test_reset_elements_copies_one_or_the_other(pair: Any, tmp_path: Path) -> None:
    folder, tuned, base = pair
    text = "{op: reset_elements, of: [tuned, base], share: 0.3, seed: 4}"
    found = step(folder, text, tmp_path / "out")
    same(found, step(folder, text, tmp_path / "again", threads=1))
    moved = total = back = 0
    for name in SHAPES:
        differ = bits(tuned[name]) != bits(base[name])
        is_base, is_tuned = found[name] == base[name], found[name] == tuned[name]
        assert bool((is_base | is_tuned).all())
        if differ:
            changed = tuned[name] != base[name]
            moved, back, total = moved + 1, back + int((is_base & changed).sum()), total + int(changed.sum())
    assert moved and abs(back / total - 0.3) < 5 * math.sqrt(0.21 / total)
    other = step(folder, text.replace("seed: 4", "seed: 5"), tmp_path / "other")
    assert bits(other["b"]) != bits(found["b"])


def test_reset_elements_streamed_as_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = {n: rng.standard_normal((PIECE // 500 + 200, 1000), dtype=np.float32) for n in ("tuned", "base")}
    for name, x in tensors.items():
        write_file(tmp_path / name / "model.safetensors", {"w": x})
    made = surgery.ops.reset_elements(surgery.open(tmp_path / "tuned"), surgery.open(tmp_path / "base"), seed=9)
    from surgery.ops.eager import apply_to_tensors

    flat = apply_to_tensors(surgery.ops.registry["reset_elements"], [torch.from_numpy(tensors[n]) for n in tensors], {"seed": 9},
                            key=f"{made.node.key}/w")  # fmt: skip
    assert torch.equal(made["w"].compute(), flat)
    x, y = torch.ones(5), torch.zeros(5)
    assert torch.equal(reset_elements(x, y, share=0.0), x) and torch.equal(reset_elements(x, y, share=1.0), y)


# -- reset: layers and blocks --------------------------------------------------------------------------------------------

LAYERS = {**dict.fromkeys(("q", "k", "v", "o"), "attention"), **dict.fromkeys(("gate", "up", "down"), "feed-forward"),
          **dict.fromkeys(("n1", "n2"), "norm")}  # fmt: skip


@given(depth=st.integers(0, 9), seed=st.integers(0, 2**40))
def test_half_of_the_layers_is_even_in_both_directions(depth: int, seed: int) -> None:
    cells = half_of([LAYERS] * depth, seed)
    assert cells == half_of([dict(reversed(LAYERS.items()))] * depth, seed)
    for block in range(depth):
        for category, size in (("attention", 4), ("feed-forward", 3), ("norm", 2)):
            drawn = sum((block, n) in cells for n, c in LAYERS.items() if c == category)
            assert drawn in (size // 2, (size + 1) // 2)
    for name in LAYERS:
        drawn = sum((block, name) in cells for block in range(depth))
        assert drawn in (depth // 2, (depth + 1) // 2)


@given(count=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_half_of_the_blocks(count: int, seed: int) -> None:
    drawn = half_of_blocks(count, seed)
    assert drawn <= set(range(count)) and len(drawn) in (count // 2, (count + 1) // 2)
    assert all(len(drawn & {i, i + 1}) == 1 for i in range(0, count - 1, 2))


def test_the_draw_varies_with_the_seed() -> None:
    assert len({frozenset(half_of([LAYERS] * 4, seed)) for seed in range(30)}) == 30
    counts = [sum((0, n) in half_of([LAYERS] * 4, seed) for seed in range(100)) for n in LAYERS]
    assert all(25 < c < 75 for c in counts)  # each about half of the time: 5 standard deviations
    assert len({frozenset(half_of_blocks(8, seed)) for seed in range(200)}) == 16


def test_blocks_that_differ_are_drawn_by_themselves() -> None:
    odd = {"mixer.in": "feed-forward", "mixer.out": "feed-forward", "n": "norm"}
    cells = half_of([LAYERS, odd], 3)
    assert sum((1, n) in cells for n in ("mixer.in", "mixer.out")) == 1


@pytest.fixture
def tuned_and_base(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "tuned")):
        tensors = llama_tensors(seed, depth=4)
        for i in range(4):
            for extra in ("k_proj", "v_proj", "o_proj"):
                tensors[f"model.layers.{i}.self_attn.{extra}.weight"] = tensors[f"model.layers.{i}.self_attn.q_proj.weight"] + i
            tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = tensors[f"model.layers.{i}.input_layernorm.weight"] * 2
        write_checkpoint(tmp_path / name, tensors, config=llama_config(4))
    return tmp_path


def origin(folder: Path, found: dict[str, np.ndarray]) -> dict[str, str]:
    """Which of the two every tensor is a copy of, to the bit."""
    base, tuned = read_checkpoint(folder / "base"), read_checkpoint(folder / "tuned")
    made = {n: "base" if bits(x) == bits(base[n]) else "tuned" if bits(x) == bits(tuned[n]) else "?" for n, x in found.items()}
    assert "?" not in made.values() and made.keys() == tuned.keys()
    return made


def test_half_of_the_layers_goes_back(tuned_and_base: Path, tmp_path: Path) -> None:
    found = origin(tuned_and_base, step(tuned_and_base, "{op: reset, of: [tuned, base], seed: 1}", tmp_path / "out"))
    assert all(o == "tuned" for n, o in found.items() if ".layers." not in n)
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "input_layernorm",
    ):
        assert sum(found[f"model.layers.{i}.{part}.weight"] == "base" for i in range(4)) == 2
    for i in range(4):
        assert found[f"model.layers.{i}.self_attn.q_proj.weight"] == found[f"model.layers.{i}.self_attn.q_proj.bias"]
        assert sum(found[f"model.layers.{i}.self_attn.{p}_proj.weight"] == "base" for p in "qkvo") == 2
    path = recipe(tuned_and_base, "out: {op: reset, of: [tuned, base], seed: 1}", models=("base", "tuned"))
    for program in plan(path).programs:  # and only what is taken is read
        assert {e.source.label for e in walk([program.expr]) if isinstance(e, Read)} == {found[program.name]}


def test_half_of_the_blocks_goes_back(tuned_and_base: Path, tmp_path: Path) -> None:
    text = "{op: reset, of: [tuned, base], by: blocks, outside: base}"
    found = origin(tuned_and_base, step(tuned_and_base, text, tmp_path / "out"))
    blocks = [{o for n, o in found.items() if f".layers.{i}." in n} for i in range(4)]
    assert all(len(b) == 1 for b in blocks) and blocks.count({"base"}) == 2
    assert all(o == "base" for n, o in found.items() if ".layers." not in n)


def test_reset_from_python_and_by_elements(tuned_and_base: Path) -> None:
    tuned, base = (surgery.open(tuned_and_base / n) for n in ("tuned", "base"))
    made = surgery.steps.reset(tuned, base, by="elements", seed=2)
    plain = surgery.ops.reset_elements(tuned, base, seed=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[name].compute(), plain[name].compute())
    halves = surgery.steps.reset(tuned, base)
    assert halves.node.token != surgery.steps.reset(tuned, base, seed=1).node.token
    with pytest.raises(Refused, match="outside"):
        surgery.steps.reset(tuned, base, by="elements", outside="base")
    with pytest.raises(Refused, match="`by`"):
        surgery.steps.reset(tuned, base, by="nonsense")


def test_reset_of_what_does_not_fit(tuned_and_base: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "flat", {"w": np.ones((3, 3), np.float32)})
    flat, tuned, base = (surgery.open(p) for p in (tmp_path / "flat", tuned_and_base / "tuned", tuned_and_base / "base"))
    with pytest.raises(Refused, match="has none"):
        list(surgery.steps.reset(flat, flat))
    wide = llama_tensors(0, depth=4, hidden=16)
    write_checkpoint(tmp_path / "wide", wide, config=llama_config(4, hidden=16))
    with pytest.raises(Refused, match=r"does not have it|shapes differ"):
        list(surgery.steps.reset(tuned, surgery.open(tmp_path / "wide")))
    single = {n: x.astype(np.float32) for n, x in read_checkpoint(tuned_and_base / "base").items()}
    write_checkpoint(tmp_path / "single", single, config=llama_config(4))
    made = surgery.steps.reset(tuned, surgery.open(tmp_path / "single"))  # a base in another type is rounded to the tuned one's
    plain = surgery.steps.reset(tuned, base)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(made[name].compute(), plain[name].compute())


# -- intruders -----------------------------------------------------------------------------------------------------------


def reference(tuned: np.ndarray, base: np.ndarray, scale: float, k: int, eps: float) -> tuple[np.ndarray, int]:
    u0, s0, _ = np.linalg.svd(base, full_matrices=False)
    u, s, vh = np.linalg.svd(tuned, full_matrices=False)
    u0 = u0[:, s0 > 1e-6 * max(s0[0], 1e-300)]
    out, found = tuned.copy(), 0
    for j in range(min(k, int((s > 1e-6 * max(s[0], 1e-300)).sum()))):
        if np.abs(u0.T @ u[:, j]).max(initial=0.0) < eps:
            out += (scale - 1.0) * s[j] * np.outer(u[:, j], vh[j])
            found += 1
    return out, found


def with_intruders(shape: tuple[int, int], rank: int, strength: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape) / math.sqrt(max(shape))
    change = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return base + strength * change / np.linalg.norm(change, 2), base


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30), (60, 200), (200, 60)], ids=str)
@pytest.mark.parametrize(("scale", "k", "eps"), [(0.75, 10, 0.5), (0.0, 3, 0.9), (2.0, 500, 0.5), (1.0, 10, 0.5)])
def test_tame_intruders(shape: tuple[int, int], kind: torch.dtype, scale: float, k: int, eps: float) -> None:
    tuned, base = (torch.from_numpy(x).to(kind) for x in with_intruders(shape, 3, 6.0))
    made = tame_intruders(tuned, base, scale=scale, k=k, eps=eps)
    expected, found = reference(tuned.double().numpy(), base.double().numpy(), scale, k, eps)
    assert found >= 1
    tolerance = 1e-12 if kind == torch.float64 else 3e-6
    np.testing.assert_allclose(made.double().numpy(), expected, atol=tolerance * float(tuned.abs().max()), rtol=0)
    if scale == 1.0:
        assert torch.equal(made, tuned)


def test_no_intruders_no_change() -> None:
    _, base = with_intruders((30, 40), 1, 0.0)
    tuned = torch.from_numpy(base * 1.1).float()
    assert torch.equal(tame_intruders(tuned, torch.from_numpy(base).float()), tuned)
    for shape in [(7,), (), (0,), (0, 4), (4, 3, 3, 3), (6, 5, 3)]:
        x = torch.randn(shape)
        assert torch.equal(tame_intruders(x, x * 2), x)


def test_odd_matrices() -> None:
    zeros, x = torch.zeros(6, 5), torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tame_intruders(zeros, x), zeros)
    torch.testing.assert_close(tame_intruders(x, zeros, scale=0.0), zeros, atol=1e-6, rtol=0)  # nothing is known: all are new
    assert Directions(zeros, precision=2.0**-23).best_cosines(torch.eye(6, dtype=torch.float64)).tolist() == [0.0] * 6
    one = torch.tensor([[2.0]])
    assert torch.equal(tame_intruders(one, one * 3), one)  # the cosine is 1 up to sign
    stack = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1))
    other = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(2))
    made = tame_intruders(stack, other, eps=0.9)
    for e in range(3):
        assert torch.equal(made[e], tame_intruders(stack[e], other[e], eps=0.9))


def test_tame_intruders_streamed(tmp_path: Path) -> None:
    base = llama_tensors(0, hidden=24, vocab=30)
    tuned = dict(base)
    name = "model.layers.1.self_attn.q_proj.weight"
    moved, _ = with_intruders((24, 24), 1, 40.0, seed=3)
    tuned[name] = (base[name].astype(np.float32) + moved.astype(np.float32)).astype(BF16)
    for label, x in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / label, x, config=llama_config(hidden=24, vocab=30))
    found = step(tmp_path, "{op: tame_intruders, of: [tuned, base], scale: 0.5}", tmp_path / "out")
    expected, count = reference(tuned[name].astype(np.float64), base[name].astype(np.float64), 0.5, 10, 0.5)
    assert count == 1
    np.testing.assert_allclose(found[name].astype(np.float64), expected, rtol=2**-8, atol=1e-6)
    same({n: x for n, x in found.items() if n != name}, {n: x for n, x in tuned.items() if n != name})
    eager = tame_intruders(*(torch.from_numpy(x[name].astype(np.float32)) for x in (tuned, base)), scale=0.5)
    assert bits(eager.bfloat16().view(torch.int16).numpy()) == bits(found[name])


def test_steps_are_documented() -> None:
    from surgery.cli.ops_ import command

    for name in ("graft", "reset", "reset_elements", "tame_intruders"):
        done = CliRunner().invoke(command, [name], catch_exceptions=False)
        assert done.exit_code == 0 and "arXiv" in done.output
    from surgery.recipe.schema import recipe_schema

    text = repr(recipe_schema())
    assert all(f"'{name}'" in text for name in ("graft", "reset", "reset_elements", "tame_intruders"))
