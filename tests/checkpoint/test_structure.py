"""Structure, ties and vocabulary of many families, from the files that transformers writes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from families import EXPECTED, VOCAB, config_in, saved, shapes_in
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgery.checkpoint.structure import layers_renamed, structure_of
from surgery.checkpoint.ties import declared_ties, tie_flag
from surgery.checkpoint.towers import Tower
from surgery.checkpoint.vocabulary import vocabulary_rows
from surgery.errors import Refused

each_family = pytest.mark.parametrize("family", sorted(EXPECTED))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def towers_of(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, int]:
    return {tower.prefix: tower.depth for tower in structure_of(dict.fromkeys(names, shape)).towers}


def block(path: str, *more: str) -> list[str]:
    return [f"{path}.{rest}.weight" for rest in ("attn.q", "attn.o", "mlp.up", "norm", *more)]


# --- towers -------------------------------------------------------------------------------------------------


@each_family
def test_the_towers_of_a_family_and_their_depths(family, root):
    structure = structure_of(shapes_in(saved(family, root)))
    assert {tower.prefix: tower.depth for tower in structure.towers} == EXPECTED[family].towers
    assert all(tower.staged == EXPECTED[family].staged for tower in structure.towers)


@each_family
def test_each_block_of_a_tower_holds_tensors_and_agrees_with_its_path(family, root):
    shapes = shapes_in(saved(family, root))
    structure = structure_of(shapes)
    seen = {tower.prefix: set() for tower in structure.towers}
    for name in shapes:
        found = structure.block(name)
        if found:
            tower, index = found
            assert name.startswith(tower.blocks[index] + ".")
            assert structure.position(name) == (index / (tower.depth - 1) if tower.depth > 1 else 0)
            seen[tower.prefix].add(index)
        else:
            assert 0 <= structure.position(name) <= 1
    assert {prefix: len(indices) for prefix, indices in seen.items()} == EXPECTED[family].towers


BEFORE = {
    "llama": ["model.embed_tokens.weight"],
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight"],
    "bert": ["bert.embeddings.LayerNorm.weight", "bert.embeddings.token_type_embeddings.weight"],
    "albert": ["albert.encoder.embedding_hidden_mapping_in.weight"],
    "t5": ["shared.weight"],
    "vit": ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.bias"],
    "clip": ["vision_model.pre_layrnorm.weight", "vision_model.embeddings.class_embedding"],
    "whisper": ["model.encoder.conv1.weight", "model.decoder.embed_positions.weight"],
    "wav2vec2": ["wav2vec2.feature_extractor.conv_layers.0.conv.weight", "wav2vec2.masked_spec_embed"],
    "convnext": ["convnext.embeddings.patch_embeddings.weight"],
    "blip2": ["query_tokens"],
}
AFTER = {
    "llama": ["model.norm.weight", "lm_head.weight"],
    "llama_classifier": ["score.weight"],
    "gpt2": ["transformer.ln_f.bias"],
    "gpt_neox": ["embed_out.weight", "gpt_neox.final_layer_norm.weight"],
    "bert": ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.weight"],
    "bert_base": ["pooler.dense.weight"],
    "t5": ["encoder.final_layer_norm.weight"],
    "vit": ["vit.layernorm.weight", "classifier.weight"],
    "clip": ["text_projection.weight", "logit_scale", "vision_model.post_layernorm.bias"],
    "llava": ["multi_modal_projector.linear_1.weight"],
    "gemma3_vision": ["vision_tower.head.attention.in_proj_weight"],
    "qwen2_5_vl": ["visual.merger.mlp.0.weight", "visual.merger.mlp.2.bias"],
    "convnext": ["convnext.layernorm.weight"],
    "bart": ["final_logits_bias"],
}


@pytest.mark.parametrize("expected, table", [(0.0, BEFORE), (1.0, AFTER)], ids=["before", "after"])
def test_what_lies_outside_the_blocks_comes_before_or_after_them(expected, table, root):
    for family, names in table.items():
        shapes = shapes_in(saved(family, root))
        structure = structure_of(shapes)
        for name in names:
            assert name in shapes and structure.block(name) is None, (family, name)
            assert structure.position(name) == expected, (family, name)


def test_a_stage_keeps_its_blocks_in_running_order_and_its_downsampling_at_its_end(root):
    structure = structure_of(shapes_in(saved("swin", root)))
    (tower,) = structure.towers
    assert tower.blocks == tuple(f"swin.encoder.layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1))
    assert structure.position("swin.encoder.layers.1.blocks.0.layernorm_before.weight") == 2 / 3
    assert structure.position("swin.encoder.layers.0.downsample.reduction.weight") == 1 / 3


def test_a_wrapper_number_is_no_block():
    names = [n for i in range(3) for n in block(f"0.auto_model.encoder.layer.{i}")]
    assert towers_of("0.auto_model.embeddings.w", *names) == {"0.auto_model.encoder.layer": 3}
    assert towers_of(*names, "2.linear.weight", "2.linear.bias") == {"0.auto_model.encoder.layer": 3}
    assert towers_of(*names, "1.linear.weight", "1.linear.bias") == {"0.auto_model.encoder.layer": 3}


def test_blocks_at_the_top_of_a_sequential_are_a_tower():
    assert towers_of(*block("0"), *block("1")) == {"": 2}


def test_two_kinds_of_block_that_share_nothing_are_one_tower_when_each_is_repeated():
    mamba = [f"layers.{i}.mamba.{w}" for i in (0, 1, 3, 4) for w in ("a.weight", "b.weight")]
    other = [f"layers.{i}.full.{w}" for i in (2, 5) for w in ("q.weight", "k.weight")]
    assert towers_of(*mamba, *other) == {"layers": 6}


def test_stages_with_other_modules_between_them_are_one_tower():
    """SwiftFormer: stages of different length, a lone projection between each two, one numbered list."""
    stages = [
        n for i, depth in ((0, 1), (2, 2), (4, 3)) for b in range(depth) for n in block(f"net.{i}.blocks.{b}")
    ]
    assert towers_of(*stages, "net.1.proj.weight", "net.3.proj.weight") == {"net": 5}


def test_a_sequential_of_different_modules_is_no_tower():
    assert towers_of("net.0.attn.q.weight", "net.0.attn.k.weight", "net.1.mlp.a.w", "net.1.mlp.b.w") == {}


def test_numbers_with_a_hole_are_no_tower():
    assert towers_of(*block("layers.0"), *block("layers.2")) == {}
    # A part of a checkpoint: its inner lists must not be taken for towers either.
    part = [n for i in (5, 6) for e in (0, 1) for n in block(f"layers.{i}.experts.{e}")]
    assert towers_of(*part) == {}


def test_bare_weights_are_a_tower_only_for_want_of_another():
    assert towers_of("mlp.0.weight", "mlp.1.weight", "mlp.2.weight") == {"mlp": 3}
    assert towers_of("mlp.0.weight", "mlp.1.weight", *block("h.0"), *block("h.1")) == {"h": 2}
    assert towers_of("mlp.0.weight", "mlp.2.weight") == {}


def test_stages_spelt_in_one_word_are_one_tower():
    shapes = {
        f"layer{s}.{b}.{rest}": (2**s, 2**s, 3, 3)
        for s in (1, 2, 3)
        for b in (0, 1)
        for rest in ("conv1.w", "conv2.w")
    }
    structure = structure_of(
        {"conv1.weight": (8, 3, 7, 7), "bn1.weight": (8,), **shapes, "fc.weight": (2, 8)}
    )
    (tower,) = structure.towers
    assert tower.blocks == ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
    assert [structure.position(n) for n in ("bn1.weight", "layer3.0.conv1.w", "fc.weight")] == [0.0, 0.8, 1.0]


def test_experts_are_not_taken_for_stages_even_when_they_are_most_of_a_layer():
    names = [n for i in range(3) for e in range(64) for n in block(f"model.layers.{i}.mlp.experts.{e}")]
    assert towers_of(*names) == {"model.layers": 3}


def test_lists_side_by_side_in_a_stage_leave_the_stage_a_block():
    """A UNet's stages: residual and attention blocks take turns, and neither list holds most of the stage."""
    shapes = {
        f"down_blocks.{s}.{kind}.{i}.{rest}": (8 * 2**s, 8)
        for s in range(3)
        for kind, parts in (("resnets", ["conv1.w", "conv2.w"]), ("attentions", ["q.w", "k.w", "v.w", "o.w"]))
        for i in range(2)
        for rest in parts
        if kind == "resnets" or s  # the first stage has no attention
    }
    (tower,) = structure_of(shapes).towers
    assert tower.blocks == ("down_blocks.0", "down_blocks.1", "down_blocks.2")


def test_names_without_numbers_and_hostile_names_are_harmless():
    assert structure_of({}).towers == ()
    assert structure_of({}).position("model.norm.weight") == 1.0
    assert towers_of("weight", ".", "..", "a..0..b") == {}
    assert towers_of("0." * 20_000 + "w", "layers." + "9" * 5_000 + ".w") == {}


def deepseek_v3_shapes() -> dict[str, tuple[int, ...]]:
    parts = ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, 7168)}
    for i in range(61):
        layer = f"model.layers.{i}"
        for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{part}.weight"] = (7168, 1536)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (7168,)
        owners = [""] if i < 3 else ["shared_experts.", *(f"experts.{e}." for e in range(256))]
        for owner in owners:
            shapes.update({f"{layer}.mlp.{owner}{part}.weight": (2048, 7168) for part in parts})
    return {**shapes, "model.norm.weight": (7168,), "lm_head.weight": (129280, 7168)}


def test_forty_five_thousand_names_take_a_moment():
    shapes = deepseek_v3_shapes()
    assert len(shapes) > 45_000
    times = []
    for _ in range(3):  # the best of three: the machine is shared
        start = time.perf_counter()
        structure = structure_of(shapes)
        times.append(time.perf_counter() - start)
    assert [(tower.prefix, tower.depth) for tower in structure.towers] == [("model.layers", 61)]
    assert structure.position("model.layers.30.mlp.experts.133.gate_proj.weight") == 0.5
    assert min(times) < 0.4


# --- renaming layers ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_cutting_twice_is_cutting_once(data):
    tower = Tower("h", tuple(f"h.{i}" for i in range(4)))
    names = ["wte.weight", *(f"h.{i}.w" for i in range(4))]
    first = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=5))
    once = layers_renamed(names, tower, first)
    between = Tower("h", tuple(f"h.{i}" for i in range(len(first))))
    twice = {new: once[old] for new, old in layers_renamed(once, between, second).items()}
    assert twice == layers_renamed(names, tower, [first[i] for i in second])
    assert layers_renamed(names, tower, range(4)) == {name: name for name in names}


def test_a_block_may_be_repeated_and_moved():
    tower = Tower("h", ("h.0", "h.1", "h.2"))
    renamed = layers_renamed(["h.0.w", "h.1.w", "h.2.w", "ln.w"], tower, [2, 0, 2])
    assert renamed == {"h.0.w": "h.2.w", "h.1.w": "h.0.w", "h.2.w": "h.2.w", "ln.w": "ln.w"}


def test_what_only_the_first_block_has_stays_first():
    tower = Tower("h", ("h.0", "h.1", "h.2"))
    names = ["h.0.w", "h.0.bias_table", "h.1.w", "h.2.w"]
    assert layers_renamed(names, tower, [1, 0]) == {
        "h.0.w": "h.1.w",
        "h.1.w": "h.0.w",
        "h.0.bias_table": "h.0.bias_table",
    }
    # A dense first layer has other tensors, not more of them: it goes where it is put.
    dense = ["h.0.norm", "h.0.mlp", "h.1.norm", "h.1.experts", "h.2.norm", "h.2.experts"]
    assert layers_renamed(dense, tower, [1, 0])["h.1.mlp"] == "h.0.mlp"


@pytest.mark.parametrize("keep", [[], [3], [-1, 0]])
def test_blocks_that_are_not_there_are_refused(keep):
    with pytest.raises(Refused, match="it has 3 blocks"):
        layers_renamed(["h.0.w"], Tower("h", ("h.0", "h.1", "h.2")), keep)


def test_stages_are_not_cut(root):
    shapes = shapes_in(saved("swin", root))
    with pytest.raises(Refused, match="stages"):
        layers_renamed(shapes, structure_of(shapes).towers[0], [0, 1])


# --- ties ---------------------------------------------------------------------------------------------------


@each_family
def test_the_declared_ties_of_a_family(family, root):
    folder = saved(family, root)
    shapes = shapes_in(folder)
    assert declared_ties(shapes, config_in(folder)) == EXPECTED[family].ties


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "gemma3"])
def test_what_the_config_does_not_say_comes_from_the_class(family, root):
    config = config_in(saved(family, root))
    del config["tie_word_embeddings"]
    assert tie_flag(config) is None
    assert declared_ties(shapes_in(saved(family, root)), config) == EXPECTED[family].ties


def test_a_class_that_does_not_tie_by_default_declares_nothing(root):
    folder = saved("llama", root)
    config = config_in(folder)
    del config["tie_word_embeddings"]
    assert declared_ties(shapes_in(folder), config) == {}


def test_a_config_that_does_not_tie_is_believed_without_transformers(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = {**config_in(saved("gpt2", root)), "tie_word_embeddings": False}
    assert declared_ties(["transformer.wte.weight"], config) == {}
    assert declared_ties(["transformer.wte.weight"], None) == {}


def test_a_config_that_does_not_tie_is_believed_against_its_class(root):
    """T5 1.1 says that it does not tie, and has a head of its own; transformers' T5 ties regardless."""
    folder = saved("t5", root)
    config = {**config_in(folder), "tie_word_embeddings": False}
    assert declared_ties([*shapes_in(folder), "lm_head.weight"], config) == {}


def test_names_decide_when_no_class_is_known():
    config = {
        "model_type": "brand_new",
        "architectures": ["BrandNewForCausalLM"],
        "tie_word_embeddings": True,
    }
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    assert declared_ties(names, config) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert declared_ties([*names, "embed_out.weight"], config) == {
        "embed_out.weight": "model.embed_tokens.weight"
    }
    assert declared_ties([*names, "x.wte.weight"], config) == {}, "two embeddings: not ours to choose"
    del config["tie_word_embeddings"]
    assert declared_ties(names, config) == {}


def test_code_and_kernels_named_by_a_config_are_left_alone(root, tmp_path):
    folder = saved("gpt2", root)
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code was run')")
    config = {
        **config_in(folder),
        "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"},
        "_attn_implementation": "somebody/kernels",
        "quantization_config": {"quant_method": "no-such-method"},
    }
    assert declared_ties(shapes_in(folder), config) == EXPECTED["gpt2"].ties
    config["architectures"] = ["os"]
    assert declared_ties(shapes_in(folder), config) == EXPECTED["gpt2"].ties


def test_stored_names_without_the_class_prefix_are_recognised(root):
    folder = saved("gpt2", root)
    names = [name.removeprefix("transformer.") for name in shapes_in(folder)]
    assert declared_ties(names, config_in(folder)) == {"lm_head.weight": "wte.weight"}


def test_the_canonical_name_is_one_that_is_stored(root):
    config = config_in(saved("t5", root))
    ties = declared_ties(["encoder.embed_tokens.weight", "decoder.block.0.w"], config)
    assert ties == {
        "shared.weight": "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "lm_head.weight": "encoder.embed_tokens.weight",
    }
    assert declared_ties(["decoder.block.0.w"], config) == {}


def test_tie_flag_reads_top_and_language_parts_only():
    assert tie_flag(None) is None
    assert tie_flag({"tie_word_embeddings": True}) is True
    assert tie_flag({"text_config": {"tie_word_embeddings": False}}) is False
    assert tie_flag({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) is None
    assert tie_flag({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}) is False


# --- vocabulary ---------------------------------------------------------------------------------------------


@each_family
def test_the_vocabulary_rows_of_a_family(family, root):
    folder = saved(family, root)
    shapes = shapes_in(folder)
    rows = vocabulary_rows(shapes, config_in(folder))
    assert set(rows) == set(EXPECTED[family].rows)
    assert all(shapes[name][axis] == VOCAB for name, axis in rows.items())
    assert {name for name, axis in rows.items() if axis} == {"final_logits_bias"} & set(rows)


def test_vocabulary_rows_without_a_stated_size_come_from_the_embedding():
    shapes = {"wte.weight": (99, 8), "head.weight": (99, 8), "norm.weight": (8,), "wpe.weight": (32, 8)}
    assert vocabulary_rows(shapes, None) == {"wte.weight": 0, "head.weight": 0}
    assert vocabulary_rows(shapes, {"vocab_size": 100}) == {}


def test_tables_of_positions_and_of_other_vocabularies_are_left_out():
    shapes = {"wte.weight": (32, 8), "wpe.weight": (32, 8), "visual.codes.weight": (16, 8)}
    config = {"vocab_size": 32, "vision_config": {"vocab_size": 16}, "type_vocab_size": 16}
    assert vocabulary_rows(shapes, config) == {"wte.weight": 0}


def test_no_tensor_of_a_block_has_vocabulary_rows():
    names = [n for i in range(2) for n in block(f"h.{i}")]
    assert vocabulary_rows(dict.fromkeys(["wte.weight", *names], (4, 4)), {"vocab_size": 4}) == {
        "wte.weight": 0
    }


# --- the boundary -------------------------------------------------------------------------------------------


def test_none_of_this_imports_torch_or_transformers():
    code = (
        "import sys\n"
        "import surgery.checkpoint.config, surgery.checkpoint.structure, surgery.checkpoint.towers\n"
        "import surgery.checkpoint.ties, surgery.checkpoint.vocabulary\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)


@pytest.mark.parametrize("family", ["bert", "opt", "t5", "whisper"])
def test_a_declared_tie_is_a_tie_of_the_loaded_model(family, root):
    """The alias and the canonical name are one storage once transformers has loaded the files."""
    folder = saved(family, root)
    model = getattr(transformers, config_in(folder)["architectures"][0]).from_pretrained(folder)
    live = dict(model.named_parameters(remove_duplicate=False))
    stored = load_file(folder / "model.safetensors")
    for alias, canonical in declared_ties(stored, config_in(folder)).items():
        assert live[alias].data_ptr() == live[canonical].data_ptr()
        torch.testing.assert_close(live[alias].detach(), stored[canonical], rtol=0, atol=0)
