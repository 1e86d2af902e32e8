"""`smooth` on checkpoints of many families: the same function, scales that are the formula's, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_json
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import Refused
from surgery.statistics.collect import collect

transformers = pytest.importorskip("transformers")
VOCABULARY, HIDDEN = 19, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0}
OPT = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 24, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
# class, config, tensors per block that change
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaForCausalLM", GROUPED, 9),
    "llama-biased": ("LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}, 11),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}, 10),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 6}, 9),
    "mistral": ("MistralForCausalLM", GROUPED, 9),
    "smollm3": ("SmolLM3ForCausalLM", GROUPED, 9),
    "granite": ("GraniteForCausalLM", {**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5}, 9),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 4, "sliding_window": 8}, 9),
    "roberta": ("RobertaForSequenceClassification", {**SIZES, "pad_token_id": 0}, 3),
    "electra": ("ElectraForSequenceClassification", {**SIZES, "embedding_size": 8}, 3),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 4}, 9),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 4, "sliding_window": 8}, 9),
    "phi3": ("Phi3ForCausalLM", GROUPED, 5),
    "gpt2": ("GPT2LMHeadModel", GPT2, 8),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, 6),
    "opt": ("OPTForCausalLM", OPT, 12),
    "opt-post": ("OPTForCausalLM", {**OPT, "do_layer_norm_before": False, "activation_function": "gelu"}, 3),
    "bert": ("BertForSequenceClassification", SIZES, 3),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
                                             "max_position_embeddings": 32}, 3),
}  # fmt: skip


def build(folder: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    name, sizes, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(3)
    model = kind(kind.config_class(**{**sizes, **more}))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.2)
            if p.ndim == 1 and "norm" in key.lower() + key.replace("ln_", "norm"):
                p[3] *= 12.0  # an outlier channel
    model.to(dtype).save_pretrained(folder)
    return folder


def texts(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    rows = [json.dumps({"input_ids": draw.integers(1, VOCABULARY, 12).tolist()}) for _ in range(8)]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    return folder / "texts.jsonl"


def logits(folder: Path, family: str) -> torch.Tensor:
    model, report = getattr(transformers, FAMILIES[family][0]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.from_numpy(np.random.default_rng(9).integers(1, VOCABULARY, (3, 14)))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def smoothed(folder: Path, model: Path, stats: Path, out: str, **keys: Any) -> Path:
    made = surgery.steps.smooth(surgery.open(model), surgery.open(stats), **keys)
    made.save(folder / out, overwrite=True)
    return folder / out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smoothed_model_is_the_same_function(family: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", family)
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path), rows=20)
    before, base = load_file(model / "model.safetensors"), logits(model, family)
    for kind in ("fixed", "adaptive"):
        out = smoothed(tmp_path, model, tmp_path / "inputs", kind, kind=kind, **({"steps": 20} if kind == "adaptive" else {}))
        after = load_file(out / "model.safetensors")
        changed = {n for n, v in before.items() if not torch.equal(v, after[n])}
        assert len(changed) == 2 * FAMILIES[family][2] if kind == "fixed" else 0 < len(changed) <= 2 * FAMILIES[family][2]
        assert float((logits(out, family) - base).abs().max()) <= 2e-5 * float(base.abs().max())
    exact = load_file(smoothed(tmp_path, model, tmp_path / "inputs", "exact", kind="fixed", exact=True) / "model.safetensors")
    offset = family.startswith("gemma")  # its norms are stored less one: these do round
    for name, v in exact.items():
        old = before[name]
        mantissa = torch.equal(torch.frexp(v)[0], torch.frexp(old)[0])
        assert mantissa or (offset and v.ndim == 1), name


def test_powers_of_two_change_no_bit_of_bfloat16_logits(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama", torch.bfloat16)
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path))
    out = smoothed(tmp_path, model, tmp_path / "inputs", "out", exact=True)
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(out, "llama"), logits(model, "llama"))
    plain = smoothed(tmp_path, model, tmp_path / "inputs", "plain")
    off = float((logits(plain, "llama") - logits(model, "llama")).abs().max())
    assert 0 < off < 0.1 * float(logits(model, "llama").abs().max())  # weights are rounded to bfloat16 again


def test_scales_are_those_of_the_formula_through_grouped_queries(tmp_path: Path) -> None:
    """Fixed scales, tensor by tensor, from what hooks see of the live model."""
    model = build(tmp_path / "model", "llama")
    data = texts(tmp_path)
    collect(str(model), tmp_path / "inputs", kind="inputs", data=data, rows=5)
    out = load_file(smoothed(tmp_path, model, tmp_path / "inputs", "out", kind="fixed", alpha=0.7) / "model.safetensors")
    live = transformers.LlamaForCausalLM.from_pretrained(model)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def look(module: Any, inputs: Any) -> None:
            peak = inputs[0].detach().abs().reshape(-1, inputs[0].shape[-1]).amax(0).double()
            seen[name] = torch.maximum(seen.get(name, peak), peak)

        return look

    for name, module in live.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for line in data.read_text().splitlines():
            live(torch.tensor([json.loads(line)["input_ids"]]))
    w = {n: v.double() for n, v in load_file(model / "model.safetensors").items()}
    b = "model.layers.1"

    def scale(readers: list[str]) -> torch.Tensor:
        peak = torch.cat([w[f"{b}.{r}.weight"] for r in readers]).abs().amax(0)
        return seen[f"{b}.{readers[0]}"] ** 0.7 / peak**0.3

    qkv = scale([f"self_attn.{p}_proj" for p in "qkv"])
    heads_seen = seen[f"{b}.self_attn.o_proj"].reshape(2, 2, 4).amax(1)  # key-value head, queries in it, channel
    heads_peak = w[f"{b}.self_attn.o_proj.weight"].abs().amax(0).reshape(2, 2, 4).amax(1)
    values = (heads_seen**0.7 / heads_peak**0.3).reshape(-1)
    spread = values.reshape(2, 1, 4).expand(2, 2, 4).reshape(-1)
    down = scale(["mlp.down_proj"])
    up = scale(["mlp.gate_proj", "mlp.up_proj"])
    expected = {
        "input_layernorm": w[f"{b}.input_layernorm.weight"] / qkv,
        "self_attn.q_proj": w[f"{b}.self_attn.q_proj.weight"] * qkv,
        "self_attn.v_proj": w[f"{b}.self_attn.v_proj.weight"] * qkv / values[:, None],
        "self_attn.o_proj": w[f"{b}.self_attn.o_proj.weight"] * spread,
        "post_attention_layernorm": w[f"{b}.post_attention_layernorm.weight"] / up,
        "mlp.up_proj": w[f"{b}.mlp.up_proj.weight"] * up / down[:, None],
        "mlp.down_proj": w[f"{b}.mlp.down_proj.weight"] * down,
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[f"{b}.{name}.weight"].double(), value, rtol=1e-5, atol=1e-7)
    assert torch.equal(out["model.norm.weight"].double(), w["model.norm.weight"])


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen2", "gemma", "gemma2"])
def test_keys_and_queries_take_scales_through_rotary_embedding(family: str, tmp_path: Path) -> None:
    """max|k|^alpha of the longest pair, from the live model's own layers; queries take it once for every head that shares keys."""
    model = build(tmp_path / "model", family)
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path), rows=500)
    out = smoothed(tmp_path, model, tmp_path / "inputs", "out", at="keys", alpha=0.8)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    base = logits(model, family)
    assert float((logits(out, family) - base).abs().max()) <= 2e-5 * float(base.abs().max())
    both = smoothed(tmp_path, model, tmp_path / "inputs", "both", at=["norm", "keys", "out", "down"], steps=10)
    assert float((logits(both, family) - base).abs().max()) <= 2e-5 * float(base.abs().max())
    live = getattr(transformers, FAMILIES[family][0]).from_pretrained(model)
    made: list[torch.Tensor] = []
    live.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, o: made.append(o.detach()[0].double()))
    with torch.no_grad():
        for line in (tmp_path / "texts.jsonl").read_text().splitlines():
            live(torch.tensor([json.loads(line)["input_ids"]]))
    keys = torch.cat(made).reshape(-1, 2, 4)  # token, head, channel
    pair = torch.stack([torch.hypot(keys[..., i], keys[..., i + 2]).amax(0) for i in range(2)], dim=1) ** 0.8
    scale = torch.cat([pair, pair], dim=1)  # head, channel
    name = "model.layers.1.self_attn."
    for kind in ("weight", "bias"):
        for layer, factor in (("k_proj", 1 / scale.reshape(-1)), ("q_proj", scale[:, None].expand(2, 2, 4).reshape(-1))):
            old, new = before.get(f"{name}{layer}.{kind}"), after.get(f"{name}{layer}.{kind}")
            if old is not None:
                wanted = old.double() * (factor[:, None] if old.ndim == 2 else factor)
                torch.testing.assert_close(new.double(), wanted, rtol=1e-5, atol=1e-8)
    changed = {n.split(".")[-2] for n, v in before.items() if not torch.equal(v, after[n])}
    assert changed == {"q_proj", "k_proj"}


def test_keys_are_scaled_only_where_nothing_stands_in_between(tied: Path, tmp_path: Path) -> None:
    model = build(tmp_path / "model", "qwen3")  # has norms of queries and keys
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path))
    with pytest.raises(Refused, match="no scale can be moved at keys"):
        len(surgery.steps.smooth(surgery.open(model), surgery.open(tmp_path / "inputs"), at="keys"))
    config = json.loads((tied / "model/config.json").read_text())
    for more in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        write_json(tied / "model/config.json", {**config, **more})
        with pytest.raises(Refused, match=r"no scale can be moved at keys|pairs are not known"):
            len(surgery.steps.smooth(surgery.open(tied / "model"), surgery.open(tied / "inputs"), at=["keys"]))
    write_json(tied / "model/config.json", {**config, "head_dim": 3})
    with pytest.raises(Refused, match="no keys and queries"):
        len(surgery.steps.smooth(surgery.open(tied / "model"), surgery.open(tied / "inputs"), at=["keys"]))
    write_json(tied / "model/config.json", config)


def test_the_language_model_of_several_parts(tmp_path: Path) -> None:
    """Its config is inside another one, and a vision tower has attention of its own, which stays as it is."""
    model = build(tmp_path / "model", "llama")
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path))
    for folder in (tmp_path / "model", tmp_path / "inputs"):
        tensors = {f"language_model.{n}": v for n, v in load_file(folder / "model.safetensors").items()}
        if folder.name == "model":
            more = [(f"vision.encoder.layers.{i}.self_attn.{p}_proj.weight", torch.ones(8, 8)) for i in range(3) for p in "qkv"]
            tensors |= dict(more) | {f"vision.encoder.layers.{i}.layer_norm1.weight": torch.ones(8) for i in range(3)}
        (folder.parent / f"whole-{folder.name}").mkdir()
        save_file(tensors, folder.parent / f"whole-{folder.name}/model.safetensors")
    config = json.loads((model / "config.json").read_text())
    write_json(tmp_path / "whole-model/config.json", {"model_type": "llava", "text_config": config})
    said = json.loads((tmp_path / "inputs/statistics.json").read_text())
    write_json(tmp_path / "whole-inputs/statistics.json", {**said, "model": {}})
    whole = smoothed(tmp_path, tmp_path / "whole-model", tmp_path / "whole-inputs", "whole-out", kind="fixed")
    alone = load_file(smoothed(tmp_path, model, tmp_path / "inputs", "out", kind="fixed") / "model.safetensors")
    for name, v in load_file(whole / "model.safetensors").items():
        assert torch.equal(v, torch.ones_like(v) if "vision" in name else alone[name.removeprefix("language_model.")]), name


def test_recipes_threads_and_places(tmp_path: Path) -> None:
    """From a recipe, on two threads, in one place alone; plans say what is scaled."""
    model = build(tmp_path / "model", "llama")
    collect(str(model), tmp_path / "inputs", kind="inputs", data=texts(tmp_path))
    recipe = tmp_path / "smooth.yaml"
    recipe.write_text(
        "models: {m: model, seen: inputs}\n"
        "steps: {easy: {op: smooth, of: [m, seen], kind: grid, weight_bits: 4, activation_bits: 16, group: 8, at: [down]}}\n"
        "output: {from: easy}\n"
    )
    surgery.load(recipe).save(tmp_path / "one", threads=1)
    surgery.load(recipe).save(tmp_path / "two", threads=2)
    one, two, before = (load_file(tmp_path / p / "model.safetensors") for p in ("one", "two", "model"))
    assert all(torch.equal(v, two[n]) for n, v in one.items())
    changed = {n.split(".", 3)[3] for n, v in one.items() if not torch.equal(v, before[n])}
    assert changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert "2 scales: down" in str(surgery.load(recipe).plan())


def test_the_model_need_not_be_the_one_on_disk_but_statistics_must_fit(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    data = texts(tmp_path)
    collect(str(model), tmp_path / "inputs", kind="inputs", data=data)
    open_ = surgery.open(model)
    half = surgery.ops.lerp(open_, open_, alpha=0.5)  # of the same sources
    assert len(surgery.steps.smooth(half, surgery.open(tmp_path / "inputs"))) == len(open_)
    torch.manual_seed(4)
    other = build(tmp_path / "other", "llama", tie_word_embeddings=True)
    with pytest.raises(Refused, match="collected from other weights"):
        len(surgery.steps.smooth(surgery.open(other), surgery.open(tmp_path / "inputs")))
    collect(str(model), tmp_path / "gram", kind="gram", data=data)
    for wrong in (tmp_path / "gram", model):
        with pytest.raises(Refused, match="kind inputs"):
            surgery.steps.smooth(open_, surgery.open(wrong))


NORM = {"{block}.input_layernorm": [f"{{block}}.self_attn.{p}_proj" for p in "qkv"]}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"feeds": {"{block}.input_layernorm": ["{block}.self_attn.q_proj"]}}, "sees the same inputs as"),
        ({"feeds": {**NORM, "{block}.post_attention_layernorm": "{block}.self_attn.q_proj"}}, "but reads one"),
        ({"feeds": {"{block}.no_norm": "{block}.mlp.down_proj"}}, "there is no `model.layers.0.no_norm.weight`"),
        ({"feeds": {"{block}.mlp.gate_proj": "{block}.self_attn.o_proj"}}, "makes 24 channels, and .* reads 16"),
        ({"feeds": {"{block}.input_layernorm": "lm_head"}}, "must both name a"),
        ({"feeds": {"model.norm": "lm_head"}}, "is tied to"),
        ({"at": "norm", "feeds": NORM}, "names the layers already"),
        ({"kind": "fixed", "steps": 4}, "`steps` does not go with kind fixed"),
        ({"weight_bits": 16, "activation_bits": 16}, "nothing to choose"),
        ({"weight_bits": 16, "group": 8}, "`group` is of quantised weights"),
        ({"weight_bits": 1}, "weight_bits"),
        ({"floor": 0}, "floor"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], says: str, tied: Path) -> None:
    with pytest.raises(Refused, match=says):
        len(surgery.steps.smooth(surgery.open(tied / "model"), surgery.open(tied / "inputs"), **keys))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    build(folder / "model", "llama", tie_word_embeddings=True)
    collect(str(folder / "model"), folder / "inputs", kind="inputs", data=texts(folder))
    return folder


def test_damaged_statistics_unknown_families_and_missing_norms(tied: Path, tmp_path: Path) -> None:
    stats = load_file(tied / "inputs/model.safetensors")
    said = json.loads((tied / "inputs/statistics.json").read_text())

    def other(tensors: dict[str, torch.Tensor]) -> surgery.Checkpoint:
        folder = tmp_path / "stats"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        write_json(folder / "statistics.json", said)
        return surgery.open(folder)

    name = "model.layers.0.mlp.down_proj.weight"
    model = surgery.open(tied / "model")
    with pytest.raises(Refused, match="no finite ranges"):
        len(surgery.steps.smooth(model, other({**stats, name: torch.full_like(stats[name], torch.nan)})))
    with pytest.raises(Refused, match="statistics are of 8 channels"):
        len(surgery.steps.smooth(model, other({**stats, name: stats[name][:, :8].contiguous()})))
    with pytest.raises(Refused, match="no statistics of any layer"):
        len(surgery.steps.smooth(model, other({"lm_head.weight": stats[name]})))
    some = surgery.steps.smooth(model, other({n: v for n, v in stats.items() if ".0." in n}))
    assert "stay as they are" in str(some.plan())
    with pytest.raises(Refused, match="cannot absorb a scale"):
        len(surgery.steps.smooth(surgery.steps.drop(model, what="*.1.input_layernorm.weight"), surgery.open(tied / "inputs")))
    config = json.loads((tied / "model/config.json").read_text())
    write_json(tied / "model/config.json", {**config, "model_type": "olmo2"})
    try:
        with pytest.raises(Refused, match="not known of models of type olmo2"):
            len(surgery.steps.smooth(surgery.open(tied / "model"), surgery.open(tied / "inputs")))
    finally:
        write_json(tied / "model/config.json", config)
    bert = build(tmp_path / "bert", "bert")
    with pytest.raises(Refused, match="no scale can be moved at norm"):
        collect(str(bert), tmp_path / "b", kind="inputs", data=texts(tmp_path))
        len(surgery.steps.smooth(surgery.open(bert), surgery.open(tmp_path / "b"), at=["norm"]))
