"""Dropping blocks by angular distance, and two narrow networks as one wide one."""

import json

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery import steps

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A llama whose blocks 2 and 3 do almost nothing, and texts for it."""
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for i, block in enumerate(made.model.layers):
            size = 0.01 if i in (2, 3) else 3.0
            block.mlp.down_proj.weight *= size
            block.self_attn.o_proj.weight *= size
    made.save_pretrained(tmp_path / "m")
    lines = [json.dumps({"input_ids": [(7 * i + 3 * j) % 97 for j in range(9)]}) for i in range(5)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return made


def test_angular_distances_against_hidden_states(tmp_path, model):
    from surgery.cli.depth_ import command

    args = [str(tmp_path / "m"), "--data", str(tmp_path / "texts.jsonl"), "--json"]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["depth"] == 6 and found["texts"] == 5
    states = []  # independent: the model's own hidden states, which have the final norm only at the very end
    for line in (tmp_path / "texts.jsonl").read_text().splitlines():
        with torch.no_grad():
            out = model(torch.tensor([json.loads(line)["input_ids"]]), output_hidden_states=True)
        states.append(torch.stack([h[0, -1] for h in out.hidden_states[:-1]]).double().numpy())
    for n in range(1, 6):
        for start in range(6 - n):
            angles = []
            for x in states:
                a, b = x[start], x[start + n]
                angles.append(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / np.pi)
            assert found["distances"][str(n)][start] == pytest.approx(np.mean(angles), abs=1e-6)
    shown = CliRunner().invoke(command, args[:-1], catch_exceptions=False).stdout
    assert "2 blocks: least for 2 to 3" in shown
    (tmp_path / "angles.json").write_text(done.stdout)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "models: {m: m}\nsteps: {short: {op: drop_layers, of: m, count: 2, distances: angles.json}}\noutput: {from: short}\n"
    )
    surgery.load(recipe).save(tmp_path / "short")
    cut = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "short")
    assert cut.config.num_hidden_layers == 4
    assert torch.equal(cut.model.layers[2].mlp.up_proj.weight, model.model.layers[4].mlp.up_proj.weight)


def test_given_and_deepest_blocks(tmp_path, model):
    opened = surgery.open(tmp_path / "m")
    name = "model.layers.{}.mlp.up_proj.weight"
    deepest = steps.drop_layers(opened, count=2)
    assert deepest.config["num_hidden_layers"] == 4
    assert torch.equal(deepest[name.format(3)].compute(), opened[name.format(5)].compute())  # the last block stays
    given = steps.drop_layers(opened, count=1, start=0)
    assert torch.equal(given[name.format(0)].compute(), opened[name.format(1)].compute())


@pytest.mark.parametrize(
    "keys,words",
    [({"count": 6}, "leaves nothing"), ({"count": 2, "start": 5}, "do not exist"), ({"count": 2, "distances": "no.json"}, "no.json")],
)
def test_bad_input(tmp_path, model, keys, words):
    with pytest.raises(surgery.Refused, match=words):
        steps.drop_layers(surgery.open(tmp_path / "m"), **keys)


def narrow(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    return {
        "first.weight": random(16, 10), "first.bias": random(16), "inner.weight": random(16, 16), "inner.bias": random(16),
        "out.weight": random(5, 16),
    }  # fmt: skip


def forward(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(x @ w["first.weight"].T + w["first.bias"])
    x = torch.relu(x @ w["inner.weight"].T + w["inner.bias"])
    return x @ w["out.weight"].T


def test_a_wide_network_gives_the_mean_of_two_narrow_ones(tmp_path):
    nets = [narrow(1), narrow(2)]
    for i, net in enumerate(nets):
        save_file(net, tmp_path / f"{i}.safetensors")
    a, b = (surgery.open(tmp_path / f"{i}.safetensors") for i in range(2))
    steps.grow(a, b, reads="first.weight", writes="out.weight").save(tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert wide["inner.weight"].shape == (32, 32) and wide["out.weight"].shape == (5, 32)
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(3))
    want = (forward(nets[0], x) + forward(nets[1], x)) / 2
    assert (forward(wide, x) - want).abs().max() < 1e-5


@pytest.mark.parametrize("writes", ["out.weight", "out.*"])
def test_the_bias_of_an_output_layer_becomes_the_mean_of_both(tmp_path, writes):
    for i in (1, 2):
        bias = torch.full((5,), float(i)) * torch.arange(5)
        save_file({**narrow(i), "out.bias": bias}, tmp_path / f"{i}.safetensors")
    a, b = (surgery.open(tmp_path / f"{i}.safetensors") for i in (1, 2))
    steps.grow(a, b, reads="first.weight", writes=writes).save(tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert torch.equal(wide["out.bias"], 1.5 * torch.arange(5))
    assert wide["inner.bias"].shape == (32,)


def test_a_language_model_grows_into_one_that_loads(tmp_path, model):
    opened = surgery.open(tmp_path / "m")
    steps.grow(opened, opened).save(tmp_path / "wide")
    wide = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "wide").eval()
    assert wide.config.hidden_size == 64
    ids = torch.arange(9)[None]
    with torch.no_grad():  # equal halves share one norm scale: here even a language model is exact
        assert torch.allclose(wide(ids).logits, model(ids).logits, atol=1e-4)


def test_large_matrices_are_grown_piece_by_piece(tmp_path):
    a, b = (torch.randn(900, 700, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for name, x in (("a", a), ("b", b)):
        save_file({"x": x, "v": x[0].clone()}, tmp_path / f"{name}.safetensors")
    steps.grow(*(surgery.open(tmp_path / f"{n}.safetensors") for n in "ab")).save(tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert torch.equal(wide["x"], torch.block_diag(a, b)) and torch.equal(wide["v"], torch.cat([a[0], b[0]]))


def test_grow_refuses_different_models(tmp_path, model):
    save_file({"y": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(surgery.Refused, match="one of the two"):
        steps.grow(surgery.open(tmp_path / "m"), surgery.open(tmp_path / "y.safetensors")).plan()
    with pytest.raises(surgery.Refused, match="no tensor matches"):
        steps.grow(surgery.open(tmp_path / "m"), surgery.open(tmp_path / "m"), reads="nix*").plan()
