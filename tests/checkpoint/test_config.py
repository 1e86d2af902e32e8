"""Configs that stay true: above all, transformers loads what comes out of cutting layers, whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from families import EXPECTED, VOCAB, config_in, saved, shapes_in
from safetensors.torch import load_file, save_file

from surgery.checkpoint.config import (
    layer_count,
    subconfigs,
    with_dtype,
    with_layers,
    with_tied,
    with_vocab_size,
)
from surgery.checkpoint.structure import layers_renamed, structure_of
from surgery.errors import Refused


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


# The towers whose layers can be cut, and what to keep: the order changes where nothing forbids it.
KEEP = {
    # Jamba's layers alternate by a period that the config states: only cuts that respect it are true.
    ("jamba", "model.layers"): [[2, 1], [0, 1, 2, 1]],
    # "The first k layers are dense": a dense layer must stay in front.
    ("deepseek_v3", "model.layers"): [[0, 2], [1, 2], [0, 1, 2, 2]],
}
# One layer; ALBERT's only group stands for all its layers.
UNCUT = {"albert", "llama_one_layer", "mixtral_one_layer"}
CUTS = [
    pytest.param(family, prefix, keep, id=f"{family}-{prefix}-{keep}")
    for family, expected in EXPECTED.items()
    if not expected.staged and family not in UNCUT
    for prefix, depth in expected.towers.items()
    for keep in KEEP.get((family, prefix), [[depth - 1], [depth - 1, 0], [0, 1, *range(depth)]])
]


def cut(folder, out, prefix: str, keep: list[int]):
    """A checkpoint with only these blocks of a tower, made by the code under test, and its renaming."""
    tensors = load_file(folder / "model.safetensors")
    (tower,) = [t for t in structure_of(shapes_in(folder)).towers if t.prefix == prefix]
    renamed = layers_renamed(shapes_in(folder), tower, keep)
    config = with_layers(config_in(folder), tower.depth, keep, prefix)
    out.mkdir()
    save_file(
        {new: tensors[old].clone() for new, old in renamed.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(config))
    return renamed, config


def loaded(folder):
    """The model in a folder, and what transformers had to say about loading it."""
    model_class = getattr(transformers, config_in(folder)["architectures"][0])
    return model_class.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("family, prefix, keep", CUTS)
def test_transformers_loads_a_cut_model_whole(family, prefix, keep, root, tmp_path):
    folder = saved(family, root)
    renamed, config = cut(folder, tmp_path / "cut", prefix, keep)
    model, info = loaded(tmp_path / "cut")
    complaints = {what: names for what, names in info.items() if names}
    assert complaints == {}
    assert layer_count(config, prefix) == len(keep)

    # What transformers writes back has the same names and the kept blocks' values.
    model.save_pretrained(tmp_path / "again")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == renamed.keys()
    for new, old in renamed.items():
        torch.testing.assert_close(after[new], before[old], rtol=0, atol=0)
    again = structure_of(shapes_in(tmp_path / "again"))
    depths = {tower.prefix: tower.depth for tower in again.towers}
    assert depths == {**EXPECTED[family].towers, prefix: len(keep)}


@pytest.mark.parametrize(
    "family, path", [("llama", "model.layers"), ("gemma3", "model.layers"), ("gpt2", "transformer.h")]
)
def test_a_cut_model_computes_what_the_live_model_does_without_those_layers(family, path, root, tmp_path):
    keep = [2, 0]
    cut(saved(family, root), tmp_path / "cut", path, keep)
    with torch.no_grad():
        ids = torch.arange(12)[None]
        found = loaded(tmp_path / "cut")[0].eval()(ids, use_cache=False).logits
        model = loaded(saved(family, root))[0].eval()
        owner, _, attribute = path.rpartition(".")
        layers = getattr(model.get_submodule(owner), attribute)
        setattr(model.get_submodule(owner), attribute, torch.nn.ModuleList([layers[i] for i in keep]))
        model.config.num_hidden_layers = len(keep)
        if types := getattr(model.config, "layer_types", None):
            model.config.layer_types = [types[i] for i in keep]
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("family", sorted(EXPECTED))
def test_the_config_states_the_depth_of_each_tower(family, root):
    config = config_in(saved(family, root))
    for prefix, depth in EXPECTED[family].towers.items():
        if not EXPECTED[family].staged and family != "albert":  # ALBERT states runs, not groups
            assert layer_count(config, prefix) == depth


@pytest.mark.parametrize("family", sorted(EXPECTED))
def test_nothing_else_changes_and_nothing_is_mutated(family, root):
    config = config_in(saved(family, root))
    before = copy.deepcopy(config)
    assert list(with_dtype(config, "float16")) == list(config)
    assert with_dtype(config, "float32") == config
    for prefix, depth in EXPECTED[family].towers.items():
        if layer_count(config, prefix) == depth:
            assert with_layers(config, depth, range(depth), prefix) == config
            assert list(with_layers(config, depth, [0], prefix)) == list(config)
    for part in (with_tied(config, True), with_vocab_size(config, 99)):
        part["architectures"].append("x")
    assert config == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "clip", "llava", "gemma3_vision", "blip2", "t5"])
def test_a_grown_vocabulary_loads(family, root, tmp_path):
    folder = saved(family, root)
    size = 80
    tensors = load_file(folder / "model.safetensors")
    for name in EXPECTED[family].rows:
        axis = 1 if name == "final_logits_bias" else 0
        tensors[name] = torch.cat(
            [tensors[name], tensors[name].narrow(axis, 0, size - VOCAB)], axis
        ).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(with_vocab_size(config_in(folder), size)))
    _, info = loaded(tmp_path)
    assert {what: names for what, names in info.items() if names} == {}


@pytest.mark.parametrize("family", ["llama", "llava", "blip2", "gpt2", "gemma3_vision", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_as_stated(family, tied, root):
    config = with_tied(config_in(saved(family, root)), tied)
    known = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(known)
    weights = [name for name in model.all_tied_weights_keys if name.endswith("weight")]
    assert len(weights) == tied


# --- without transformers -----------------------------------------------------------------------------------


def test_dtype_is_stated_under_the_key_that_is_there():
    old = {"torch_dtype": "float32", "text_config": {"dtype": None}, "quantization_config": {"dtype": "int8"}}
    assert with_dtype(old, "bfloat16") == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "quantization_config": {"dtype": "int8"},
    }
    assert with_dtype({"text_config": {}}, "bfloat16") == {"text_config": {}, "dtype": "bfloat16"}


def test_lists_and_patterns_follow_the_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "ffn_multipliers": [0.5, 1.0, 2.0, 4.0],
        "no_rope_layers": [1, 1, 1, 0],
        "hybrid_override_pattern": "M*-E",
        "mlp_only_layers": [0, 3],
        "moe_layers": [],
        "max_window_layers": 2,
        "num_kv_shared_layers": 1,
        "suppress_tokens": [4, 3, 2, 1],
        "eos_token_id": [0, 1, 2, 3],
        "architectures": ["A", "B", "C", "D"],
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 4,
        "decoder_sparse_step": 4,
        "attn_layer_period": 4,
    }
    new = with_layers(config, 4, [0, 2, 3], "model.layers")
    changed = {key: value for key, value in new.items() if config[key] != value}
    assert changed == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "c", "d"],
        "ffn_multipliers": [0.5, 2.0, 4.0],
        "no_rope_layers": [1, 1, 0],
        "hybrid_override_pattern": "M-E",
        "mlp_only_layers": [0, 2],
        "max_window_layers": 1,
    }
    # Layers of the first and of the last kind in between: no count says that, so it is left.
    mixed = with_layers(config, 4, [3, 0, 2], "model.layers")
    assert (mixed["max_window_layers"], mixed["num_kv_shared_layers"]) == (2, 1)
    assert mixed["mlp_only_layers"] == [0, 1]


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "depth",
        "num_blocks",
        "num_transformer_layers",
    ],
)
def test_a_layer_count_is_known_by_its_words(key):
    assert with_layers({key: 5}, 5, [0, 4]) == {key: 2}
    assert layer_count({key: 5}) == 5


@pytest.mark.parametrize(
    "key", ["max_depth_of_tree", "num_adapter_layers", "global_attn_every_n_layers", "layers_step"]
)
def test_other_numbers_are_no_layer_count(key):
    assert with_layers({"n_layer": 5, key: 5}, 5, [1]) == {"n_layer": 1, key: 5}
    assert layer_count({key: 5}) is None


def test_a_config_that_only_names_the_kind_of_each_layer_is_cut():
    config = {"model_type": "x", "hybrid_override_pattern": "M*-E", "layers_block_type": ["m", "a", "f", "e"]}
    assert layer_count(config, "layers") == 4
    new = with_layers(config, 4, [3, 1], "layers")
    assert new == {"model_type": "x", "hybrid_override_pattern": "E*", "layers_block_type": ["e", "a"]}


def test_encoder_and_decoder_have_counts_of_their_own():
    bart = {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3, "is_encoder_decoder": True}
    assert with_layers(bart, 3, [0], "model.decoder.layers") == {**bart, "decoder_layers": 1}
    assert with_layers(bart, 3, [0], "model.encoder.layers") == {
        **bart,
        "encoder_layers": 1,
        "num_hidden_layers": 1,
    }
    lists = {**bart, "encoder_kinds": ["a", "b", "c"], "decoder_kinds": ["d", "e", "f"]}
    assert with_layers(lists, 3, [2], "model.decoder.layers")["decoder_kinds"] == ["f"]
    assert with_layers(lists, 3, [2], "model.decoder.layers")["encoder_kinds"] == ["a", "b", "c"]
    opt = {"num_hidden_layers": 3}
    assert with_layers(opt, 3, [0], "model.decoder.layers") == {"num_hidden_layers": 1}


def test_one_count_for_both_sides_becomes_two():
    t5 = {"num_layers": 6, "is_encoder_decoder": True}
    assert with_layers(t5, 6, [0, 5], "decoder.block") == {**t5, "num_decoder_layers": 2}
    assert with_layers(t5, 6, [0, 5], "encoder.block") == {**t5, "num_layers": 2, "num_decoder_layers": 6}


def test_the_sub_config_is_found_by_the_tower_and_not_by_the_depth_alone():
    clip = {"text_config": {"num_hidden_layers": 12}, "vision_config": {"num_hidden_layers": 12}}
    cut_text = with_layers(clip, 12, [0], "text_model.encoder.layers")
    assert [part.get("num_hidden_layers") for _, part in subconfigs(cut_text)] == [None, 1, 12]
    cut_vision = with_layers(clip, 12, [0], "vision_model.encoder.layers")
    assert [part.get("num_hidden_layers") for _, part in subconfigs(cut_vision)] == [None, 12, 1]
    flat = {"num_hidden_layers": 12, "vision_config": {"depth": 12}}
    assert with_layers(flat, 12, [0], "visual.blocks") == {
        "num_hidden_layers": 12,
        "vision_config": {"depth": 1},
    }
    assert with_layers(flat, 12, [0], "model.layers") == {
        "num_hidden_layers": 1,
        "vision_config": {"depth": 12},
    }
    pair = {"encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 2}}
    assert (
        layer_count(with_layers(pair, 2, [0], "decoder.bert.encoder.layer"), "decoder.bert.encoder.layer")
        == 1
    )
    assert layer_count(with_layers(pair, 2, [0], "decoder.bert.encoder.layer"), "encoder.encoder.layer") == 2


def test_the_config_of_another_modality_is_not_taken_for_want_of_a_better():
    with pytest.raises(Refused, match=r"`model\.layers` has 12 layers"):
        with_layers({"vision_config": {"num_hidden_layers": 12}}, 12, [0], "model.layers")


def test_a_text_part_repeated_at_the_top_is_cut_in_both_places():
    text = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}
    config = {**text, "text_config": text, "vision_config": {"num_hidden_layers": 3}}
    cut_text = {"num_hidden_layers": 1, "layer_types": ["c"]}
    assert with_layers(config, 3, [2], "model.layers") == {
        **cut_text,
        "text_config": cut_text,
        "vision_config": {"num_hidden_layers": 3},
    }


def test_a_sub_config_that_leaves_its_depth_to_the_class_gets_one():
    config = {
        "text_config": {"model_type": "clip_text_model"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    new = with_layers(config, 12, [0, 1], "vision_model.encoder.layers")
    assert new["vision_config"]["num_hidden_layers"] == 2 and new["text_config"] == config["text_config"]


def test_a_config_that_states_another_depth_is_refused():
    with pytest.raises(Refused, match="it says 61"):
        with_layers({"num_hidden_layers": 61}, 62, [0], "model.layers")
    with pytest.raises(Refused, match="no layer count"):
        with_layers({"model_type": "x"}, 2, [0], "model.layers")
    for keep in ([], [2], [-1]):
        with pytest.raises(Refused, match="cannot keep"):
            with_layers({"n_layer": 2}, 2, keep, "h")


def test_vocabulary_size_changes_where_the_old_one_was():
    config = {
        "text_config": {"vocab_size": 100},
        "qformer_config": {"vocab_size": 50},
        "vision_config": {"vocab_size": 100},
    }
    new = with_vocab_size(config, 120)
    assert [new[part]["vocab_size"] for part in config] == [120, 50, 100]
    assert with_vocab_size({"vocab_size": 5, "type_vocab_size": 2}, 7) == {
        "vocab_size": 7,
        "type_vocab_size": 2,
    }
    assert with_vocab_size({}, 7) == {"vocab_size": 7}
    assert with_vocab_size({"text_config": {}}, 7) == {"text_config": {"vocab_size": 7}}
