"""Stacking blocks of several checkpoints: which tensor comes from where, and a config that is true."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    HIDDEN,
    config_of,
    llama,
    llama_config,
    llama_tensors,
    read_checkpoint,
    recipe,
    run,
    same,
    trio,
    write_checkpoint,
)

import surgery
from surgery.errors import Refused

PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def stacked(*checkpoints: surgery.Checkpoint, **keys: Any) -> surgery.Checkpoint:
    made = surgery.steps.stack(*checkpoints, **keys)
    assert isinstance(made, surgery.Checkpoint)
    return made


def expected(models: Mapping[str, Mapping[str, np.ndarray]], slices: Sequence[tuple[str, int, int]]) -> dict[str, np.ndarray]:
    """Blocks one after the other, embeddings of the first slice, norm and head of the last."""
    made = {"model.embed_tokens.weight": models[slices[0][0]]["model.embed_tokens.weight"]}
    blocks = [(model, i) for model, low, high in slices for i in range(low, high)]
    for new, (model, old) in enumerate(blocks):
        made |= {f"model.layers.{new}.{p}": models[model][f"model.layers.{old}.{p}"] for p in PARTS}
    return made | {n: models[slices[-1][0]][n] for n in ("model.norm.weight", "lm_head.weight")}


@pytest.mark.parametrize(
    "slices",
    [
        [("a", 0, 2), ("b", 1, 3)],
        [("a", 0, 3), ("a", 0, 3)],
        [("b", 2, 3), ("a", 0, 1), ("base", 1, 2), ("a", 0, 3)],
        [("a", 1, 2)],
    ],
)
def test_blocks_in_order(tmp_path: Path, slices: list[tuple[str, int, int]]) -> None:
    trio(tmp_path)
    opened = [surgery.open(tmp_path / model).layers[low:high] for model, low, high in slices]
    out = tmp_path / "out"
    stacked(*opened).save(out)
    models = {name: read_checkpoint(tmp_path / name) for name in ("base", "a", "b")}
    same(read_checkpoint(out), expected(models, slices))
    assert config_of(out)["num_hidden_layers"] == sum(high - low for _, low, high in slices)


def test_as_a_step_of_a_recipe(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(
        tmp_path,
        'x: {op: layers, of: a, keep: ["0:2"]}\nm: {op: average, of: [a, b]}\ny: {op: layers, of: m, keep: [2]}\n'
        "out: {op: stack, of: [x, y]}",
        models="ab",
    )
    run(path, tmp_path / "out")
    made, a, b = (read_checkpoint(tmp_path / n) for n in ("out", "a", "b"))
    name = "mlp.up_proj.weight"
    assert made[f"model.layers.1.{name}"].tobytes() == a[f"model.layers.1.{name}"].tobytes()
    mean = (a[f"model.layers.2.{name}"].astype(float) + b[f"model.layers.2.{name}"].astype(float)) / 2
    np.testing.assert_allclose(made[f"model.layers.2.{name}"].astype(float), mean, rtol=2**-8)


def test_stacks_compose(tmp_path: Path) -> None:
    """A stack can be cut and stacked again."""
    trio(tmp_path)
    a, b = (surgery.open(tmp_path / n) for n in "ab")
    twice = stacked(stacked(a, b).layers[2:5], a.layers[0:1])
    twice.save(tmp_path / "out")
    models = {name: read_checkpoint(tmp_path / name) for name in ("a", "b")}
    want = expected(models, [("a", 2, 3), ("b", 0, 2), ("a", 0, 1)])
    same(read_checkpoint(tmp_path / "out"), want)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4


def with_config(folder: Path, seed: int, depth: int, **more: Any) -> surgery.Checkpoint:
    write_checkpoint(folder, llama_tensors(seed, depth=depth), config=llama_config(depth, **more))
    return surgery.open(folder)


def test_everything_that_speaks_of_layers_is_true(tmp_path: Path) -> None:
    kinds = ["sliding", "sliding", "full", "sliding", "sliding", "full"]
    about = {"layer_types": kinds, "mlp_only_layers": [1, 4], "hybrid_override_pattern": "MM*MM*", "first_k_dense_replace": 2,
             "max_window_layers": 6, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    a, b = with_config(tmp_path / "a", 0, 6, **about), with_config(tmp_path / "b", 1, 6, **about)
    config = stacked(a.layers[0:3], b.layers[2:6]).config
    assert config is not None
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == kinds[0:3] + kinds[2:6]
    assert config["hybrid_override_pattern"] == "MM**MM*"
    assert config["mlp_only_layers"] == [1, 5]
    assert config["first_k_dense_replace"] == 2 and config["max_window_layers"] == 7


def test_merged_slices_keep_their_kinds(tmp_path: Path) -> None:
    kinds = ["sliding", "full", "sliding", "full"]
    a, b = (with_config(tmp_path / n, i, 4, layer_types=kinds) for i, n in enumerate("ab"))
    merged = surgery.ops.average(a.layers[1:3], b.layers[1:3])
    config = stacked(a.layers[3:4], merged).config
    assert config is not None and config["layer_types"] == ["full", "full", "sliding"]


def test_models_of_different_depth(tmp_path: Path) -> None:
    a = with_config(tmp_path / "a", 0, 3, layer_types=["x", "y", "x"])
    b = with_config(tmp_path / "b", 1, 5, layer_types=["p", "q", "r", "s", "t"])
    config = stacked(a.layers[0:2], b.layers[3:5]).config
    assert config is not None
    assert config["num_hidden_layers"] == 4 and config["layer_types"] == ["x", "y", "s", "t"]


def test_a_whole_model_in_a_stack(tmp_path: Path) -> None:
    a = with_config(tmp_path / "a", 0, 3, layer_types=["x", "y", "z"])
    config = stacked(a, a.layers[0:1]).config
    assert config is not None and config["layer_types"] == ["x", "y", "z", "x"] and config["num_hidden_layers"] == 4


def test_heads_of_tied_models(tmp_path: Path) -> None:
    """The last slice brings the head: its embedding, where it is tied to that and the first is not; none if all are tied."""
    for name, seed, head in (("tied", 0, False), ("also", 1, False), ("free", 2, True)):
        tensors = llama_tensors(seed, head=head)
        write_checkpoint(tmp_path / name, tensors, config=llama_config() | {"tie_word_embeddings": not head})
    tied, also, free = (surgery.open(tmp_path / n) for n in ("tied", "also", "free"))
    assert "lm_head.weight" not in stacked(tied, also)
    stacked(free, tied).save(tmp_path / "x")
    made, mine = read_checkpoint(tmp_path / "x"), read_checkpoint(tmp_path / "tied")
    assert made["lm_head.weight"].tobytes() == mine["model.embed_tokens.weight"].tobytes()
    stacked(tied, free).save(tmp_path / "y")
    assert read_checkpoint(tmp_path / "y")["lm_head.weight"].tobytes() == read_checkpoint(tmp_path / "free")["lm_head.weight"].tobytes()
    assert config_of(tmp_path / "y")["tie_word_embeddings"] is False


def test_what_only_a_first_block_has_is_not_repeated(tmp_path: Path) -> None:
    """As T5's table of relative positions."""
    tensors = dict(llama_tensors(0)) | {"model.layers.0.self_attn.relative.weight": np.ones((4, 2), np.float32)}
    write_checkpoint(tmp_path / "a", tensors, config=llama_config())
    a = surgery.open(tmp_path / "a")
    made = stacked(a.layers[0:2], a.layers[1:3])
    assert [n for n in made if "relative" in n] == ["model.layers.0.self_attn.relative.weight"]


def test_every_input_tensor_is_accounted_for(tmp_path: Path) -> None:
    trio(tmp_path)
    a, b = (surgery.open(tmp_path / n) for n in "ab")
    for use in stacked(a.layers[0:2], b.layers[2:3]).plan().uses:
        assert use.total == 12
        assert not any(reason == "has no weight in the result" for reason in use.refused.values()), use.refused


def test_vision_tower_stays_the_first_ones(tmp_path: Path) -> None:
    """Only one tower is stacked; the other, with all that belongs to it, is the first slice's."""
    made = {}
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        language = {f"model.language_model.{n.removeprefix('model.')}" if n != "lm_head.weight" else n: v
                    for n, v in llama_tensors(seed, depth=3).items()}  # fmt: skip
        vision = {"model.visual.patch_embed.weight": (HIDDEN, 3), "model.visual.post_norm.weight": (HIDDEN,)}
        vision |= {f"model.visual.blocks.{i}.{p}.weight": (HIDDEN, HIDDEN) for i in range(2) for p in ("attn.q", "mlp.up")}
        tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in vision.items()} | language
        config = {"text_config": llama_config(3), "vision_config": {"model_type": "v", "depth": 2}}
        made[name] = write_checkpoint(tmp_path / name, tensors, config=config)
    a, b = (surgery.open(tmp_path / n) for n in "ab")
    text = "model.language_model.layers"
    with pytest.raises(Refused, match="which layers"):
        stacked(a, b)
    out = stacked(a.layers(text)[0:2], b.layers(text)[0:3], tower=text)
    out.save(tmp_path / "out")
    got, one, two = (read_checkpoint(tmp_path / n) for n in ("out", "a", "b"))
    for name in one:
        if "visual" in name:
            assert got[name].tobytes() == one[name].tobytes(), name
    for name in ("lm_head.weight", "model.language_model.norm.weight"):
        assert got[name].tobytes() == two[name].tobytes()
    assert sum(n.endswith("up_proj.weight") for n in got) == 5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 5 and written["vision_config"]["depth"] == 2


@pytest.mark.parametrize(("how", "said"), [("wide", "same width"), ("vocab", "vocabularies must agree"), ("names", "name their blocks alike")])
def test_what_does_not_fit_is_refused(tmp_path: Path, how: str, said: str) -> None:
    llama(tmp_path / "a", 0)
    if how == "names":
        tensors = {n.replace("model.layers", "model.h"): v for n, v in llama_tensors(1).items()}
        write_checkpoint(tmp_path / "b", tensors, config=llama_config())
    else:
        llama(tmp_path / "b", 1, **({"hidden": 16} if how == "wide" else {"vocab": 20}))
    a, b = (surgery.open(tmp_path / n) for n in "ab")
    with pytest.raises(Refused) as found:
        stacked(a, b).plan()
    assert said in (found.value.hint or "")


def test_a_delta_on_weights_is_refused(tmp_path: Path) -> None:
    trio(tmp_path)
    base, a = (surgery.open(tmp_path / n) for n in ("base", "a"))
    with pytest.raises(Refused, match=r"is weights, .* is delta"):
        stacked(base, a - base)
    both = stacked((a - base).layers[0:1], (a - base).layers[1:3])
    assert both.space == "delta" and set(both) == set(a)
