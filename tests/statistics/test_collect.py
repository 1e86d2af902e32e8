"""Statistics collected from live models against what can be computed from weights by hand; the checkpoint and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, llama_tensors, read_checkpoint, surgery, write_checkpoint, write_json
from torch import nn

import surgery as package
from surgery.checkpoint.source import open_source
from surgery.errors import Refused
from surgery.statistics.collect import collect
from surgery.statistics.gram import groups, linear_layers
from surgery.statistics.live import load
from surgery.statistics.manifest import content_digest, read_manifest
from surgery.statistics.texts import tokenised

transformers = pytest.importorskip("transformers")
WORDS = ["[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "in"]
TEXTS = ["the cat sat on the mat", "a dog ran", "the dog and the cat ran in", "on", "cat"]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)


def save(folder: Path, kind: str, config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # random norms too
    model.to(dtype).save_pretrained(folder)
    tokenizer(folder)
    return folder


def tiny_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return save(folder, "LlamaForCausalLM", config, seed, dtype)


def tiny_gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=8, bos_token_id=0, eos_token_id=0
    )
    return save(folder, "GPT2LMHeadModel", config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two llamas, one tied, a GPT-2, and texts."""
    folder = tmp_path_factory.mktemp("live")
    tiny_llama(folder / "a", 1)
    tiny_llama(folder / "b", 2)
    tiny_llama(folder / "tied", 3, tie_word_embeddings=True)
    tiny_gpt2(folder / "gpt2")
    (folder / "texts.txt").write_text("\n".join([*TEXTS, "", "  "]) + "\n")
    return folder


def ids() -> list[list[int]]:
    return [[WORDS.index(w) for w in text.split()] for text in TEXTS]


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def test_gram_of_the_first_layer_and_of_the_head_by_hand(made: Path, tmp_path: Path) -> None:
    found = collect(str(made / "a"), tmp_path / "g", kind="gram", data=made / "texts.txt")
    w = {k: v.astype(np.float64) for k, v in read_checkpoint(made / "a").items()}
    grams = read_checkpoint(tmp_path / "g")
    assert set(grams) == {k for k in w if w[k].ndim == 2} - {"model.embed_tokens.weight"}
    assert all(g.dtype == np.float32 and g.shape == (w[k].shape[1],) * 2 for k, g in grams.items())
    eps = config_of(made / "a")["rms_norm_eps"]
    x = rms(w["model.embed_tokens.weight"][np.concatenate(ids())], w["model.layers.0.input_layernorm.weight"], eps)
    for proj in "qkv":
        np.testing.assert_allclose(grams[f"model.layers.0.self_attn.{proj}_proj.weight"], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    model = transformers.LlamaForCausalLM.from_pretrained(made / "a")
    with torch.no_grad():
        last = [model(torch.tensor([i]), output_hidden_states=True).hidden_states[-1][0].double().numpy() for i in ids()]
    x = np.concatenate(last)
    np.testing.assert_allclose(grams["lm_head.weight"], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert found.tensors == len(grams) and found.texts == 5 and found.tokens == sum(map(len, ids())) and not found.left_out


def test_gram_of_every_layer_predicts_its_outputs(made: Path, tmp_path: Path) -> None:
    """trace(W G W^T) is the mean square of the layer's outputs, which forward hooks see: an independent road to G."""
    collect(str(made / "b"), tmp_path / "g", kind="gram", data=made / "texts.txt", memory=1)
    grams = read_checkpoint(tmp_path / "g")
    assert len(list((tmp_path / "g").glob("*.safetensors"))) == len(grams)  # memory for one at a time: a pass for each
    model = transformers.LlamaForCausalLM.from_pretrained(made / "b")
    squares: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, o, n=name: squares.setdefault(n, []).append(o.detach().square().sum(-1)))
    with torch.no_grad():
        for i in ids():
            model(torch.tensor([i]))
    for name, seen in squares.items():
        weight, gram = model.get_submodule(name).weight.detach().double(), torch.from_numpy(grams[f"{name}.weight"]).double()
        expected = float(torch.cat([s.reshape(-1) for s in seen]).double().mean())
        assert float(torch.trace(weight @ gram @ weight.T)) == pytest.approx(expected, rel=1e-4)


def test_conv1d_layers_say_that_they_store_in_by_out(made: Path, tmp_path: Path) -> None:
    found = collect(str(made / "gpt2"), tmp_path / "g", kind="gram", data=made / "texts.txt")
    w, grams = ({k: v.astype(np.float64) for k, v in read_checkpoint(p).items()} for p in (made / "gpt2", tmp_path / "g"))
    assert {k: g.shape for k, g in grams.items()} == {
        f"transformer.h.{i}.{part}.weight": (8, 8, 1)
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    x = np.concatenate([w["transformer.wte.weight"][i] + w["transformer.wpe.weight"][: len(i)] for i in ids()])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * w["transformer.h.0.ln_1.weight"] + w["transformer.h.0.ln_1.bias"]
    np.testing.assert_allclose(grams["transformer.h.0.attn.c_attn.weight"][..., 0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert list(found.left_out) == ["lm_head.weight"]


def test_a_head_tied_to_the_embedding_is_left_out_and_said(made: Path, tmp_path: Path) -> None:
    found = collect(str(made / "tied"), tmp_path / "g", kind="gram", data=made / "texts.txt", only=["*q_proj*", "lm_head*"])
    assert set(read_checkpoint(tmp_path / "g")) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert list(found.left_out) == ["lm_head.weight"]


def test_groups_respect_memory(made: Path) -> None:
    layers, _ = linear_layers(load(open_source(str(made / "a"))))
    for memory in (1, 2000, 5000, 10**9):
        parts = groups(layers, memory)
        assert [x for p in parts for x in p] == layers
        assert all(sum(x.nbytes for x in p) <= memory or len(p) == 1 for p in parts)
    assert len(groups(layers, 10**9)) == 1


# -- Fisher ------------------------------------------------------------------------------------------------------------


def exact_fisher(model: Any, logits_of: Any) -> dict[str, np.ndarray]:
    """sum_t sum_y p_t(y) (d log p_t(y))^2 / T, one gradient for each position and label."""
    scores = torch.log_softmax(logits_of(model), -1)
    sums = {n: np.zeros(tuple(p.shape)) for n, p in model.named_parameters()}
    for t in range(scores.shape[0]):
        for y in range(scores.shape[1]):
            grads = torch.autograd.grad(scores[t, y], list(model.parameters()), retain_graph=True, allow_unused=True)
            for (n, _), g in zip(model.named_parameters(), grads, strict=True):
                if g is not None:
                    sums[n] += float(scores[t, y].exp()) * g.double().numpy() ** 2
    return {n: s / scores.shape[0] for n, s in sums.items()}


def test_fisher_of_a_language_model_is_the_expectation_over_labels(made: Path, tmp_path: Path) -> None:
    text, repeats = [3, 1, 2, 7], 500
    (tmp_path / "data.jsonl").write_text(f'{json.dumps({"input_ids": text})}\n' * repeats)
    found = collect(str(made / "tied"), tmp_path / "f", kind="fisher", data=tmp_path / "data.jsonl", samples=repeats)
    model = transformers.LlamaForCausalLM.from_pretrained(made / "tied")
    exact = exact_fisher(model, lambda m: m(torch.tensor([text])).logits[0])
    fishers = read_checkpoint(tmp_path / "f")
    assert set(fishers) == set(exact) == set(read_checkpoint(made / "tied")) and found.tensors == len(exact)
    for name, f in fishers.items():
        assert f.shape == exact[name].shape and (f >= 0).all()
        assert float(f.sum()) == pytest.approx(float(exact[name].sum()), rel=0.25), name
    assert sum(float(f.sum()) for f in fishers.values()) == pytest.approx(sum(float(e.sum()) for e in exact.values()), rel=0.1)
    manifest = read_manifest(tmp_path / "f")
    assert manifest is not None and manifest.tokens == repeats * len(text) and manifest.kind == "fisher"


def test_fisher_of_a_classifier(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    save(tmp_path / "m", "BertForSequenceClassification", config)
    (tmp_path / "data.txt").write_text("the cat sat\n" * 400)
    collect(str(tmp_path / "m"), tmp_path / "f", kind="fisher", data=tmp_path / "data.txt", samples=400)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    exact = exact_fisher(model, lambda m: m(torch.tensor([[1, 2, 3]])).logits)
    fishers = read_checkpoint(tmp_path / "f")
    for name in ("classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.dense.weight"):
        assert float(fishers[name].sum()) == pytest.approx(float(exact[name].sum()), rel=0.2)
    assert read_manifest(tmp_path / "f").tokens == 400


def test_the_seed_decides_the_labels(made: Path, tmp_path: Path) -> None:
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        collect(str(made / "a"), tmp_path / name, kind="fisher", data=made / "texts.txt", seed=seed)
    x, y, z = (read_checkpoint(tmp_path / n) for n in "xyz")
    assert all((x[k] == y[k]).all() for k in x) and any((x[k] != z[k]).any() for k in x)


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_the_manifest_says_where_it_is_from(made: Path, tmp_path: Path) -> None:
    collect(str(made / "a"), tmp_path / "g", kind="gram", data=made / "texts.txt", samples=3, length=4)
    said = json.loads((tmp_path / "g" / "statistics.json").read_text())
    assert said["format"] == "surgery-statistics/1" and said["kind"] == "gram"
    assert (said["samples"], said["tokens"], said["length"]) == (3, 4 + 3 + 4, 4)
    source = open_source(str(made / "a"))
    assert said["model"]["headers"] == source.fingerprint and said["model"]["content"] == content_digest(source)
    assert said["data"]["file"] == "texts.txt" and len(said["data"]["sha256"]) == 64
    opened = package.open(tmp_path / "g")
    assert opened.space == "statistics" and opened.config is None and "gram, 3 texts" in repr(opened)


def test_length_is_at_most_what_the_model_takes(made: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the cat " * 50)
    found = collect(str(made / "gpt2"), tmp_path / "g", kind="gram", data=tmp_path / "long.txt")
    assert found.tokens == 16 and read_manifest(tmp_path / "g").length == 16


def test_digests_tell_fine_tunes_apart_and_not_shards(tmp_path: Path) -> None:
    tensors = llama_tensors(1, hidden=64, vocab=100)
    whole, sharded = write_checkpoint(tmp_path / "a", tensors), write_checkpoint(tmp_path / "b", tensors, shards=3)
    digest = content_digest(open_source(str(whole)))
    assert digest == content_digest(open_source(str(sharded)))
    for name, where in (("model.norm.weight", 0), ("lm_head.weight", -1)):
        changed = {k: v.copy() for k, v in tensors.items()}
        changed[name].reshape(-1)[where] = 9
        assert digest != content_digest(open_source(str(write_checkpoint(tmp_path / f"c{where}", changed))))
    renamed = {("x" + k if k == "model.norm.weight" else k): v for k, v in tensors.items()}
    assert digest != content_digest(open_source(str(write_checkpoint(tmp_path / "d", renamed))))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no text"),
        ("not json\n", "data.jsonl:1: not JSON"),
        ('{"text": "cat"}\n{"x": 1}\n', "data.jsonl:2: needs `text` or `input_ids`"),
        ('{"input_ids": [1, -2]}\n', "needs `text`"),
        ('{"input_ids": [1, 999]}\n', "token 999.* vocabulary has 11"),
    ],
)
def test_bad_data_is_refused(made: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(Refused, match=words):
        collect(str(made / "a"), tmp_path / "g", kind="gram", data=tmp_path / "data.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


def test_bad_models_and_places_are_refused(made: Path, tmp_path: Path) -> None:
    data = made / "texts.txt"

    def refused(words: str, model: Path, out: str = "g", **more: Any) -> None:
        with pytest.raises(Refused, match=words):
            collect(str(model), tmp_path / out, **{"kind": "gram", "data": data, **more})

    bare = write_checkpoint(tmp_path / "bare", llama_tensors(1))
    refused("names its class", bare)
    write_json(bare / "config.json", {"architectures": ["NoSuchModel"], "model_type": "x"})
    refused("NoSuchModel", bare)
    lacking = read_checkpoint(made / "a")
    lacking.pop("model.norm.weight")
    write_checkpoint(tmp_path / "lacking", lacking, config=config_of(made / "a"))
    refused("lacks `model.norm.weight`", tmp_path / "lacking")
    refused("kind must be", made / "a", kind="hessian")
    refused("no linear layer", made / "a", only=["nothing*"])
    refused("no such file", made / "a", data=tmp_path / "none.txt")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    refused("already holds something", made / "a", "taken")
    refused("not overwritten", made / "a", "taken", overwrite=True)
    assert (tmp_path / "taken" / "x").read_text() == "mine"
    collect(str(made / "a"), tmp_path / "g", kind="gram", data=data, samples=1)
    collect(str(made / "a"), tmp_path / "g", kind="gram", data=data, samples=2, overwrite=True)
    assert read_manifest(tmp_path / "g").samples == 2
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    save(tmp_path / "t5", "T5ForConditionalGeneration", config)
    refused("does not run on token ids alone", tmp_path / "t5", "t")
    refused("needs a causal language model", tmp_path / "t5", "t", kind="fisher")
    assert not list(tmp_path.glob("*.partial"))


def test_texts_without_a_tokenizer_need_token_ids(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="tokenizer cannot be loaded"):
        tokenised(made / "texts.txt", tmp_path / "empty", samples=1, length=5, vocabulary=20)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": []}\n{"input_ids": [1, 2, 3]}\n{"input_ids": [4]}\n')
    assert tokenised(tmp_path / "ids.jsonl", tmp_path / "empty", samples=1, length=2, vocabulary=20) == [[1, 2]]


# -- from the command line to a merged model ---------------------------------------------------------------------------


def test_from_texts_to_a_merged_model(made: Path, tmp_path: Path) -> None:
    """`surgery statistics` for two models, `surgery run` with regmean, and transformers loads what comes out."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat\na cat\n")
    (tmp_path / "b.txt").write_text("dog ran in\nthe dog and dog\n")
    done = surgery("statistics", made / "a", "--kind", "gram", "--data", "a.txt", "-o", "ga", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 15 and "15 tensors" in done.stderr
    collect(str(made / "b"), tmp_path / "gb", kind="gram", data=tmp_path / "b.txt")
    (tmp_path / "merge.yaml").write_text(
        f"models: {{a: {made / 'a'}, b: {made / 'b'}, ga: ga, gb: gb}}\n"
        "steps:\n  merged: {op: regmean, of: [a, b, ga, gb], a: 1.0}\noutput: {from: merged}\n"
    )
    shown = surgery("plan", "merge.yaml", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "ga (gram, 2 texts, 8 tokens)" in shown.stdout and "mean for 6 tensors" in shown.stdout
    done = surgery("run", "merge.yaml", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged, a, b = (read_checkpoint(p) for p in (tmp_path / "out", made / "a", made / "b"))
    grams = [read_checkpoint(tmp_path / g) for g in ("ga", "gb")]
    for key in grams[0]:

        def loss(w: np.ndarray, key: str = key) -> float:
            pairs = zip((a[key], b[key]), (g[key] for g in grams), strict=True)
            return sum(float(np.trace((w - v) @ g.astype(np.float64) @ (w - v).T)) for v, g in pairs)

        assert loss(merged[key]) <= min(loss(a[key]), loss(b[key]), loss((a[key] + b[key]) / 2)) * 1.001
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    wrong = (tmp_path / "merge.yaml").read_text().replace("[a, b, ga, gb]", "[a, b, gb, ga]")
    (tmp_path / "merge.yaml").write_text(wrong)
    done = surgery("plan", "merge.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "merge.yaml:3" in done.stderr and "other weights" in done.stderr


def test_the_command_explains_and_refuses(made: Path, tmp_path: Path) -> None:
    shown = surgery("ops", "regmean")
    assert shown.returncode == 0 and "gram statistics, one for each" in shown.stdout and "ridge" in shown.stdout
    done = surgery("statistics", tmp_path, "--kind", "gram", "--data", made / "texts.txt", "-o", tmp_path / "g")
    assert done.returncode == 2 and "no weights in it" in done.stderr


def test_inputs_are_the_ranges_and_rows_that_hooks_see(made: Path, tmp_path: Path) -> None:
    """Ranges of all rows, and the sample's rows among them; q, k and v see the same ones; GPT-2's say (in, out)."""
    collect(str(made / "a"), tmp_path / "s", kind="inputs", data=made / "texts.txt", rows=7)
    found = read_checkpoint(tmp_path / "s")
    model = transformers.LlamaForCausalLM.from_pretrained(made / "a")
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = seen.setdefault(f"{name}.weight", [])
            module.register_forward_pre_hook(lambda m, i, k=keep: k.append(i[0].detach()[0].numpy().copy()))
    with torch.no_grad():
        for i in ids():
            model(torch.tensor([i]))
    assert set(found) == set(seen)
    for name, parts in seen.items():
        rows = np.concatenate(parts)
        assert found[name].shape == (9, rows.shape[1]) and len(rows) > 7
        np.testing.assert_allclose(found[name][0], rows.min(0), rtol=1e-6)
        np.testing.assert_allclose(found[name][1], rows.max(0), rtol=1e-6)
        later = iter(rows)  # the sample is among the rows, in their order
        assert all(any(np.allclose(row, kept, rtol=1e-5, atol=1e-7) for row in later) for kept in found[name][2:])
    prefix = "model.layers.0.self_attn."
    np.testing.assert_array_equal(found[f"{prefix}q_proj.weight"], found[f"{prefix}v_proj.weight"])
    collect(str(made / "gpt2"), tmp_path / "t", kind="inputs", data=made / "texts.txt", rows=100)
    tall = read_checkpoint(tmp_path / "t")["transformer.h.0.attn.c_attn.weight"]
    assert tall.shape == (2 + sum(map(len, ids())), 8, 1)  # fewer rows than asked for: all of them


def test_every_row_is_sampled_as_often_as_any_other() -> None:
    from surgery.statistics.inputs import Sample

    counts = np.zeros(30)
    for seed in range(400):
        sample = Sample(5, seed)
        for part in np.split(np.arange(30.0), [1, 7, 8, 20]):
            sample.add(torch.from_numpy(np.stack([part, -part], axis=1)).float())
        kept = sample.result()
        assert kept.shape == (7, 2) and kept[0].tolist() == [0, -29] and kept[1].tolist() == [29, 0]
        counts[kept[2:, 0].int().numpy()] += 1
    assert counts.sum() == 2000 and abs(counts - 400 / 6).max() < 5 * np.sqrt(400 / 6 * 5 / 6)


def test_inputs_from_the_command_line(made: Path, tmp_path: Path) -> None:
    surgery("statistics", made / "a", "--kind", "inputs", "--data", made / "texts.txt", "-o", tmp_path / "s", "--rows", 3, "-q")
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None and (manifest.kind, manifest.samples) == ("inputs", 5)
    recipe = f"models: {{m: {made / 'a'}, s: {tmp_path / 's'}}}\nsteps: {{e: {{op: smooth, of: [m, s]}}}}\noutput: {{from: e}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    surgery("run", tmp_path / "r.yaml", "-o", tmp_path / "out", "-q")
    surgery("verify", tmp_path / "out")
    models = [transformers.LlamaForCausalLM.from_pretrained(p) for p in (made / "a", tmp_path / "out")]
    with torch.no_grad():
        first, second = (m(torch.tensor([ids()[0]])).logits for m in models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
