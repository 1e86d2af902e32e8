"""Dense models to mixtures of experts and back, on live transformers models."""

import json

import pytest
import torch
import transformers

import surgery
from surgery import steps

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", "mixtral", "mistral"),
    "mistral": ("MistralConfig", "mixtral", "mistral"),
    "qwen2": ("Qwen2Config", "qwen2_moe", "qwen2"),
    "qwen3": ("Qwen3Config", "qwen3_moe", "qwen3"),
}
IDS = torch.arange(24).reshape(2, 12) * 3 % 97


def dense(path, family: str, seed: int = 0):
    torch.manual_seed(seed)
    extra = {"head_dim": 8} if family == "qwen3" else {}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, FAMILIES[family][0])(**SIZES, **extra)).eval()
    model.save_pretrained(path)
    return model


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(IDS).logits


@pytest.mark.parametrize("gates", ["random", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_compute_what_the_dense_model_does_and_go_back_to_it(tmp_path, family, gates):
    model = dense(tmp_path / "d", family)
    with torch.no_grad():
        want = model(IDS).logits
    mixture = steps.upcycle(surgery.open(tmp_path / "d"), experts=4, top=2, gates=gates)
    mixture.save(tmp_path / "moe")
    live, got = logits(tmp_path / "moe")
    assert live.config.model_type == FAMILIES[family][1]
    assert (got - want).abs().max() < 1e-5
    steps.downcycle(surgery.open(tmp_path / "moe")).save(tmp_path / "back")
    live, got = logits(tmp_path / "back")
    assert live.config.model_type == FAMILIES[family][2]
    assert (got - want).abs().max() < 1e-5


def test_experts_of_other_models_and_given_gates(tmp_path):
    for i, name in enumerate("dab"):
        dense(tmp_path / name, "llama", i)
    base, a, b = (surgery.open(tmp_path / n) for n in "dab")
    gates = {f"model.layers.{i}.block_sparse_moe.gate.weight": torch.eye(2, 32) * (i + 1) for i in range(2)}
    from safetensors.torch import save_file

    save_file(gates, tmp_path / "gates.safetensors")
    mixture = steps.upcycle([base, a, b], gates=str(tmp_path / "gates.safetensors"), top=1)
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(mixture[name].compute(), b["model.layers.1.mlp.down_proj.weight"].compute())
    assert torch.equal(mixture["model.layers.1.block_sparse_moe.gate.weight"].compute(), torch.eye(2, 32) * 2)
    mixture.save(tmp_path / "moe")
    mixed = steps.downcycle(surgery.open(tmp_path / "moe"), weights=[0.25, 0.75])
    name = "model.layers.0.mlp.up_proj.weight"
    want = 0.25 * a[name].compute() + 0.75 * b[name].compute()
    assert torch.allclose(mixed[name].compute(), want, atol=1e-7)


def test_xft_mixing_is_the_formula(tmp_path):
    """dense = 0.75 shared + 0.25 sum_i softmax(a)_i expert_i, in the layout with a shared expert."""
    for i, name in enumerate("dab"):
        dense(tmp_path / name, "qwen2", i)
    base, a, b = (surgery.open(tmp_path / n) for n in "dab")
    steps.upcycle([base, a, b]).save(tmp_path / "moe")
    weights = torch.softmax(torch.tensor([0.3, -0.4]), 0)
    weights = [float(weights[0]), 1.0 - float(weights[0])]
    mixed = steps.downcycle(surgery.open(tmp_path / "moe"), weights=weights)
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{part}.weight"
        d, x, y = (m[name].compute().double() for m in (base, a, b))
        want = 0.75 * d + 0.25 * (weights[0] * x + weights[1] * y)
        assert torch.allclose(mixed[name].compute().double(), want, atol=1e-7)


def test_random_gates_depend_on_seed_and_name_alone(tmp_path):
    dense(tmp_path / "d", "llama")
    made = [steps.upcycle(surgery.open(tmp_path / "d"), experts=8, seed=s) for s in (1, 1, 2)]
    name = "model.layers.0.block_sparse_moe.gate.weight"
    one, two, other = (m[name].compute() for m in made)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert abs(float(one.mean())) < 0.01 and 0.01 < float(one.std()) < 0.03
    assert not torch.equal(one, made[0]["model.layers.1.block_sparse_moe.gate.weight"].compute())


def test_a_mixture_merges_expert_by_expert(tmp_path):
    dense(tmp_path / "d", "qwen3")
    for s in (1, 2):
        steps.upcycle(surgery.open(tmp_path / "d"), experts=3, seed=s).save(tmp_path / f"m{s}")
    surgery.ops.average(surgery.open(tmp_path / "m1"), surgery.open(tmp_path / "m2")).save(tmp_path / "out")
    assert set(surgery.open(tmp_path / "out")) == set(surgery.open(tmp_path / "m1"))
    logits(tmp_path / "out")


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"experts": 4, "top": 9}, "top"),
        ({}, "experts"),
        ({"experts": 4, "gates": "nowhere.safetensors"}, "nowhere"),
        ({"experts": 1}, "experts"),
    ],
)
def test_bad_input(tmp_path, keys, words):
    dense(tmp_path / "d", "llama")
    with pytest.raises(surgery.Refused, match=words):
        steps.upcycle(surgery.open(tmp_path / "d"), **keys).plan()


def test_other_families_are_refused(tmp_path):
    dense(tmp_path / "d", "llama")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(surgery.Refused, match="gpt2"):
        steps.upcycle(surgery.open(tmp_path / "d"), experts=2).plan()
    with pytest.raises(surgery.Refused, match="downcycle knows"):
        steps.downcycle(surgery.open(tmp_path / "d")).plan()
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    with pytest.raises(surgery.Refused, match="biases"):
        steps.upcycle(surgery.open(tmp_path / "d"), experts=2).plan()


def test_gates_from_prompts_and_the_command(tmp_path):
    from click.testing import CliRunner
    from tokenizers import Tokenizer, models, pre_tokenizers

    from surgery.cli.gates_ import command

    dense(tmp_path / "d", "llama")
    words = {w: i for i, w in enumerate(["<unk>", "add", "two", "numbers", "please", "write", "a", "poem", "about", "rain"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "d")
    (tmp_path / "p.yaml").write_text(
        "- {positive: [add two numbers]}\n- {positive: [write a poem, about rain], negative: [add two]}\n"
    )
    args = [str(tmp_path / "d"), "--prompts", str(tmp_path / "p.yaml"), "-o", str(tmp_path / "g")]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert done.exit_code == 0
    gates = surgery.open(tmp_path / "g")
    assert sorted(gates) == [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)]
    rows = gates["model.layers.1.block_sparse_moe.gate.weight"].compute()
    assert rows.shape == (2, 32) and torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)
    model = surgery.open(tmp_path / "d")
    mixture = steps.upcycle([model, model, model], gates=str(tmp_path / "g"))
    mixture.save(tmp_path / "moe")
    logits(tmp_path / "moe")
