"""Adapters among models whose vocabularies are aligned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import read_checkpoint, recipe, run, write_file, write_json
from vocab_models import HIDDEN, TABLES, model, vocab_of

from surgery import Refused

WORDS = ["<unk>", "the", "cat", "sat", "on", "mat"]
RANK = 2


def adapter(folder: Path, module: str, rows: int, *, full: bool = False) -> np.ndarray:
    """A LoRA on one module, with alpha = 2 r; returns its delta. full: the embedding's new value is in it too, all ones."""
    rng = np.random.default_rng(9)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((RANK, HIDDEN), (rows, RANK)))
    name = f"base_model.model.{module}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if full:
        tensors["base_model.model.model.embed_tokens.weight"] = np.ones((len(WORDS), HIDDEN), np.float32)
    write_file(folder / "adapter_model.safetensors", tensors)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [module.rpartition(".")[2]]}
    write_json(folder / "adapter_config.json", said | ({"modules_to_save": ["embed_tokens"]} if full else {}))
    return 2.0 * b.astype(np.float64) @ a.astype(np.float64)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", ["<unk>", "mat", "cat", "the", "dog", "sat"], 1)
    return tmp_path


def merged(folder: Path, names: str, steps: str, models: list[str] | None = None) -> dict[str, np.ndarray]:
    path = recipe(folder, steps, models=models or names.split(), output="{from: out, tokenizer: y, dtype: float32}")
    run(path, folder / "out", overwrite=True)
    return read_checkpoint(folder / "out")


def means(folder: Path, table: str, extra: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Token of y -> the mean of the row of x (plus `extra`), or y's where x lacks it, and the row of y."""
    x, y = (read_checkpoint(folder / n)[table].astype(np.float64) for n in "xy")
    x = x if extra is None else x + extra
    of_x, of_y = vocab_of(folder / "x"), vocab_of(folder / "y")
    return {t: ((x[of_x[t]] if t in of_x else y[i]) + y[i]) / 2 for t, i in of_y.items()}


def test_an_adapter_without_vocabulary_rows_is_not_touched(pair: Path) -> None:
    change = adapter(pair / "ad", "model.layers.0.mlp.up_proj", 2 * HIDDEN)
    made = merged(pair, "x y ad", "m: {op: average, of: [x, y]}\nout: {op: add, of: [m, ad]}")
    name = "model.layers.0.mlp.up_proj.weight"
    half = sum(read_checkpoint(pair / n)[name].astype(np.float64) for n in "xy") / 2
    np.testing.assert_allclose(made[name], half + change, rtol=1e-6, atol=1e-6)
    for token, row in means(pair, TABLES[0]).items():
        np.testing.assert_allclose(made[TABLES[0]][vocab_of(pair / "y")[token]], row, rtol=1e-6)


def test_an_adapter_on_the_head_moves_with_its_tokens(pair: Path) -> None:
    """As a delta it has its base's tokens, and is zero for those that its base lacks."""
    change = adapter(pair / "ad", "lm_head", len(WORDS))
    made = merged(pair, "x y ad", "m: {op: average, of: [x, y]}\nout: {op: add, of: [m, ad]}")
    of_x = vocab_of(pair / "x")
    for token, row in means(pair, TABLES[1]).items():
        wanted = row + (change[of_x[token]] if token in of_x else 0)
        np.testing.assert_allclose(made[TABLES[1]][vocab_of(pair / "y")[token]], wanted, rtol=1e-6, atol=1e-6)


def test_a_model_with_an_adapter_is_aligned_as_one(pair: Path) -> None:
    """Low-rank rows out of order, also where the other model takes a row from it."""
    change = adapter(pair / "ad", "lm_head", len(WORDS))
    path = recipe(pair, "out: {op: average, of: [x, y]}", models="xy", output="{from: out, tokenizer: y, dtype: float32}")
    path.write_text(path.read_text().replace("x: x", "x: x+ad"))
    run(path, pair / "out")
    made = read_checkpoint(pair / "out")[TABLES[1]]
    for token, row in means(pair, TABLES[1], change).items():
        np.testing.assert_allclose(made[vocab_of(pair / "y")[token]], row, rtol=1e-6, atol=1e-6)


def test_an_adapter_whose_rows_cannot_be_told_is_refused(pair: Path) -> None:
    adapter(pair / "ad", "model.layers.0.mlp.up_proj", 2 * HIDDEN, full=True)
    with pytest.raises(Refused, match=r"ad: it changes `model\.embed_tokens\.weight`") as found:
        merged(pair, "x y ad", "d: {op: lora_delta, of: [x, ad]}\nm: {op: average, of: [x, y]}\nout: {op: add, of: [m, d]}")
    assert "BASE+ADAPTER" in str(found.value)
