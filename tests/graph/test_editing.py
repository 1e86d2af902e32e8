"""Checkpoints edited from Python: what is looked at, changed and computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BF16, bits, config_of, llama, llama_config, llama_tensors, read_checkpoint, same, trio, write_checkpoint

import surgery
from surgery.errors import Failed, Refused

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def ckpt(tmp_path: Path) -> surgery.Checkpoint:
    return surgery.open(llama(tmp_path / "a", 0))


def saved(made: surgery.Checkpoint, folder: Path, **options: object) -> dict[str, np.ndarray]:
    made.save(folder, **options)
    return read_checkpoint(folder)


def array(tensor: torch.Tensor) -> np.ndarray:
    kind = BF16 if tensor.dtype is torch.bfloat16 else None
    flat = tensor.contiguous()
    return flat.view(torch.int16).numpy().view(kind) if kind is not None else flat.numpy()


def test_a_checkpoint_is_a_map_of_lazy_tensors(ckpt: surgery.Checkpoint) -> None:
    given = llama_tensors(0)
    assert dict.fromkeys(ckpt) == dict.fromkeys(given) and len(ckpt) == 12 and ckpt.space == "weights"
    assert ckpt[UP].shape == (16, 8) and ckpt[UP].dtype == "bfloat16" and UP in ckpt
    assert UP in repr(ckpt[UP]) and "READ a" in repr(ckpt)
    assert bits(array(ckpt[UP].compute())) == bits(given[UP])
    with pytest.raises(KeyError, match="did you mean"):
        ckpt["model.layers.1.mlp.up_proj.weigth"]


def test_select_and_drop(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    given = llama_tensors(0)
    same(saved(ckpt.select("*mlp*", "lm_head*"), tmp_path / "s"),
         {n: v for n, v in given.items() if "mlp" in n or "lm_head" in n})  # fmt: skip
    same(saved(ckpt.drop("*mlp*"), tmp_path / "d"), {n: v for n, v in given.items() if "mlp" not in n})
    for made in (ckpt.select("*moe*"), ckpt.drop("*moe*")):
        with pytest.raises(Refused, match=r"no tensor matches `\*moe\*`"):
            made.plan()


def test_rename(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    given = llama_tensors(0)
    same(saved(ckpt.rename({UP: "x"}), tmp_path / "m"), {"x" if n == UP else n: v for n, v in given.items()})
    same(saved(ckpt.rename(lambda n: f"new.{n}"), tmp_path / "f"), {f"new.{n}": v for n, v in given.items()})
    with pytest.raises(Refused, match=r"two tensors would be called `lm_head.weight`"):
        ckpt.rename({UP: "lm_head.weight"}).plan()
    with pytest.raises(Refused, match="there is no tensor `nope`"):
        ckpt.rename({"nope": "x"}).plan()


def test_cast(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    given = llama_tensors(0)
    made = saved(ckpt.cast(torch.float32).cast("float16", "*mlp*"), tmp_path / "c")
    for name, value in made.items():
        kind = np.float16 if "mlp" in name else np.float32
        assert value.dtype == kind and bits(value) == bits(given[name].astype(kind))
    assert config_of(tmp_path / "c")["dtype"] == "float32"  # most bytes decide
    with pytest.raises(Refused, match="int8"):
        ckpt.cast("int8")


def test_a_cast_rounds_in_the_middle_of_a_computation(tmp_path: Path) -> None:
    """Two roundings where two are asked for: float32 -> float16 -> arithmetic."""
    tensors = {n: v * np.float32(1.0001) for n, v in llama_tensors(0, dtype=np.float32).items()}
    a = surgery.open(write_checkpoint(tmp_path / "a", tensors, config=llama_config()))
    made = saved(surgery.ops.scale(a.cast("float16"), by=3.0), tmp_path / "o", dtype="float32")
    for name, value in made.items():
        assert bits(value) == bits(tensors[name].astype(np.float16).astype(np.float32) * np.float32(3))


def test_replace(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    other = surgery.open(llama(tmp_path / "b", 1))
    new = torch.arange(8, dtype=torch.bfloat16)
    made = ckpt.replace({UP: other[UP], "model.norm.weight": new, "extra": [1.5, 2.5]})
    found = saved(made, tmp_path / "o")
    assert bits(found[UP]) == bits(llama_tensors(1)[UP])
    assert bits(found["model.norm.weight"]) == bits(array(new))
    assert found["extra"].tolist() == [1.5, 2.5] and len(found) == 13
    half = ckpt.replace({UP: surgery.ops.scale(other, by=0.5)[UP]})
    assert bits(array(half[UP].compute())) == bits((llama_tensors(1)[UP].astype(np.float32) / 2).astype(BF16))
    assert made != half and ckpt.replace({"x": [1.0]}) != ckpt.replace({"x": [2.0]})


def test_map(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    given = llama_tensors(0)
    seen = []

    def flip(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append((name, tensor.dtype, tuple(tensor.shape)))
        return -tensor

    made = saved(ckpt.map(flip, "*mlp*"), tmp_path / "m")
    for name, value in made.items():
        assert bits(value) == bits(-given[name] if "mlp" in name else given[name])
    assert sorted(seen) == [(f"model.layers.{i}.mlp.up_proj.weight", torch.bfloat16, (16, 8)) for i in range(3)]
    doubled = saved(ckpt.map(lambda t: t * 2), tmp_path / "n")
    assert all(bits(v) == bits((given[n].astype(np.float32) * 2).astype(BF16)) for n, v in doubled.items())


def test_a_map_that_misbehaves(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    for function, said in ((lambda t: t[:1], "expected"), (lambda t: None, "NoneType"), (lambda t: 1 / 0, "ZeroDivision")):
        with pytest.raises(Failed, match=said):
            ckpt.map(function, UP).save(tmp_path / "o", overwrite=True)
    assert not (tmp_path / "o").exists()


def test_layers(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    given = llama_tensors(0)
    assert len(ckpt.layers) == 3
    name = "model.layers.{}.self_attn.q_proj.weight"
    for i, (keep, wanted) in enumerate(((slice(1, None), [1, 2]), ([2, 0, 2], [2, 0, 2]), (-1, [2]), (slice(None, None, -1), [2, 1, 0]))):
        made = saved(ckpt.layers[keep], tmp_path / str(i))
        assert [bits(made[name.format(j)]) for j in range(len(wanted))] == [bits(given[name.format(j)]) for j in wanted]
        assert config_of(tmp_path / str(i))["num_hidden_layers"] == len(wanted)
        assert len(made) == 3 + 3 * len(wanted)
    for keep in (3, [0, 9], slice(5, 9), []):
        with pytest.raises(Refused):
            ckpt.layers[keep]
    with pytest.raises(Refused, match="which layers"):
        ckpt.layers("vision")[0]


def test_arithmetic_knows_weights_from_deltas(tmp_path: Path) -> None:
    base, a, b = map(surgery.open, trio(tmp_path))
    delta = a - base
    assert delta.space == "delta" and (base + delta).space == "weights" and (delta + base).space == "weights"
    assert (delta + (b - base)).space == "delta" and (-delta).space == "delta" and (a - delta).space == "weights"
    assert (delta * 2 == 2 * delta) and (delta / 2 == delta * 0.5) and delta != 2 * delta
    with pytest.raises(Refused, match="weights \\+ weights is no model"):
        a + b
    for wrong in (lambda: a + 1, lambda: a * "x", lambda: a * b, lambda: a * True, lambda: a - 1):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(Refused, match="ties takes deltas; `a` is weights"):
        surgery.ops.ties(a, delta)
    with pytest.raises(Refused, match="input 2 is a int"):
        surgery.ops.average(a, 3)


def test_a_delta_can_be_saved_and_says_so(tmp_path: Path) -> None:
    base, a, _ = map(surgery.open, trio(tmp_path))
    plan = (a - base).plan()
    assert any("delta" in w for w in plan.warnings)
    made = saved(a - base, tmp_path / "d")
    first, second = llama_tensors(1), llama_tensors(0)
    for name, value in made.items():
        assert value.dtype == np.float32
        assert bits(value) == bits(first[name].astype(np.float32) - second[name].astype(np.float32))


def test_deselected_tensors_of_a_delta_count_as_zero(tmp_path: Path) -> None:
    """base + (a - base).select(mlp): everything else is the base, to the bit."""
    base, a, _ = map(surgery.open, trio(tmp_path))
    made = saved(base + (a - base).select("*mlp*"), tmp_path / "o")
    for name, value in made.items():
        assert bits(value) == bits(llama_tensors(1 if "mlp" in name else 0)[name]), name


def test_compute_gives_what_a_run_writes(tmp_path: Path) -> None:
    base, a, b = map(surgery.open, trio(tmp_path))
    ops = surgery.ops
    merged = base + ops.ties(a - base, b - base, density=0.5) * 0.7
    for made in (merged, ops.stock(base, a, b), ops.slerp(a, b, t=0.25)):
        written = saved(made, tmp_path / "o", overwrite=True)
        for name in made:
            assert bits(array(made[name].compute())) == bits(written[name]), name


def test_operators_on_tensors_and_on_checkpoints_agree(tmp_path: Path) -> None:
    a, b = (surgery.open(p) for p in trio(tmp_path, dtype=np.float32)[1:])
    lazy = surgery.ops.slerp(a, b, t=0.3)
    for name in (UP, "model.norm.weight"):
        eager = surgery.ops.slerp(a[name].compute(), b[name].compute(), t=0.3)
        torch.testing.assert_close(lazy[name].compute(), eager, rtol=1e-6, atol=1e-7)


def test_save_takes_the_settings_of_plans(ckpt: surgery.Checkpoint, tmp_path: Path) -> None:
    made = saved(ckpt, tmp_path / "o", dtype=torch.float32, shard_size="1kB", threads=1)
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 1
    assert all(v.dtype == np.float32 for v in made.values())
    with pytest.raises(Refused):
        ckpt.save(tmp_path / "p", dtype="int8")


def test_an_unfinished_run_can_be_resumed_in_the_same_process(
    ckpt: surgery.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals on the way must not keep the output locked."""
    from surgery.checkpoint.writer import Writer

    write, count = Writer.write, []

    def breaks(self: Writer, *args: object) -> None:
        count.append(1)
        if len(count) > 5:
            raise Failed("stop")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaks)
        with pytest.raises(Failed):
            ckpt.save(tmp_path / "o", threads=1)
    with pytest.raises(Refused, match="holds an unfinished run"):
        ckpt.save(tmp_path / "o")
    with pytest.raises(Refused, match="of another plan"):
        ckpt.cast("float32").save(tmp_path / "o", resume=True)
    ckpt.save(tmp_path / "o", resume=True)
    same(read_checkpoint(tmp_path / "o"), llama_tensors(0))
