"""Models with different tokenizers merged through the command line, and loaded by transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import all_bytes, config_of, read_checkpoint, recipe, surgery

tokenizers = pytest.importorskip("tokenizers")

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
SENTENCE = "the cat sat on the mat"


def llama(folder: Path, words: list[str], added: list[tuple[str, bool]], seed: int, *, rows: int, tied: bool = False) -> Path:
    """A llama of transformers, saved by it, with a WordLevel tokenizer."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=words.index("<s>"), eos_token_id=words.index("</s>"), pad_token_id=None, tie_word_embeddings=tied,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for token, special in [("<s>", True), ("</s>", True), ("<unk>", True), *added]:
        made.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    """base (padded to 16 rows), chat (same size, other ids, two tokens of its own) and code (more rows, one token)."""
    folder = tmp_path_factory.mktemp("vocabularies")
    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]
    llama(folder / "base", words, [("<tool>", False)], 0, rows=16)
    llama(folder / "chat", [*reversed(words), "dog"], [("<|user|>", True)], 1, rows=16)
    llama(folder / "code", [*words, "def"], [("<tool>", False), ("<fim>", True)], 2, rows=24)
    return folder


def vocab(folder: Path) -> dict[str, int]:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def average(models: Path, out: dict[str, int], rules: dict[str, Any] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Table -> token -> the mean of what each model has or is given for it, in float64."""
    names = ["base", "chat", "code"]
    vocabs, stored = ([f(models / n) for n in names] for f in (vocab, read_checkpoint))
    made: dict[str, dict[str, np.ndarray]] = {t: {} for t in TABLES}
    for table in TABLES:
        wide = [s[table].astype(np.float64) for s in stored]
        for token in out:
            own = [w[v[token]] if token in v else None for w, v in zip(wide, vocabs, strict=True)]
            have = [r for r in own if r is not None]
            rule = (rules or {}).get(token)
            if rule is not None:
                given, forced = rule
                row = given(wide, vocabs)
                own = [row if r is None or forced else r for r in own]
            elif own[0] is not None or len(have) == 1:
                own = [have[0] if r is None else r for r in own]
            else:
                own = [sum(have) / len(have) if r is None else r for r in own]
            made[table][token] = sum(own) / 3  # type: ignore[arg-type]
    return made


PER_TOKEN = """{source: union, pad_to_multiple_of: 32, tokens: {
    dog: {source: {model: base, token: cat}}, "<fim>": {source: zero, force: true}, "<new>": {source: {model: code, id: 5}},
    the: {source: chat, force: true}}}""".replace("\n", " ")


@pytest.mark.parametrize("policy", ["base", "union", "chat", "per-token"])
def test_four_policies_through_the_command_line(models: Path, tmp_path: Path, policy: str) -> None:
    import transformers

    said = PER_TOKEN if policy == "per-token" else policy
    text = "merged: {op: average, of: [base, chat, code]}"
    path = recipe(models, text, models=["base", "chat", "code"], output=f"{{from: merged, tokenizer: {said}}}")
    planned = surgery("plan", path)
    assert planned.returncode == 0, planned.stderr
    for name in ("base", "chat", "code"):
        assert sum(f"{name}: ALIGN" in line for line in (planned.stdout + planned.stderr).splitlines()) == 1
    out = tmp_path / "out"
    done = surgery("run", path, "-o", out)
    assert done.returncode == 0, done.stderr

    union = vocab(models / "base") | {"dog": 9, "def": 10, "<|user|>": 11, "<fim>": 12}
    expected = {
        "base": (vocab(models / "base"), 16), "chat": (vocab(models / "chat"), 16), "union": (union, 16),
        "per-token": (union | {"<new>": 13}, 32),
    }  # fmt: skip
    ids, rows = expected[policy]
    assert vocab(out) == ids
    rules = {
        "dog": (lambda wide, vocabs: wide[0][vocabs[0]["cat"]], False),
        "<fim>": (lambda wide, vocabs: np.zeros(16), True),
        "<new>": (lambda wide, vocabs: wide[2][5], False),
        "the": (lambda wide, vocabs: wide[1][vocabs[1]["the"]], True),
    }
    tables = average(models, ids, rules if policy == "per-token" else None)
    made = read_checkpoint(out)
    for name, wanted in tables.items():
        assert made[name].shape == (rows, 16)
        for token, row in wanted.items():
            step = np.abs(row) * 2.0**-8 + 1e-9  # half a unit in the last place of bfloat16, and a rounding before
            assert np.all(np.abs(made[name][ids[token]].astype(np.float64) - row) <= step), (name, token)

    config = config_of(out)
    assert config["vocab_size"] == rows and config["bos_token_id"] == ids["<s>"] and config["eos_token_id"] == ids["</s>"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.get_vocab() == ids
    assert tokenizer(SENTENCE).input_ids == [ids[w] for w in SENTENCE.split()]
    for token in ids:
        assert tokenizer(token, add_special_tokens=False).input_ids == [ids[token]]
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    made_tokens = model.generate(input_ids=inputs.input_ids, max_new_tokens=4, do_sample=False)
    assert made_tokens.shape[1] > inputs.input_ids.shape[1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": SENTENCE}], tokenize=False) == SENTENCE


def test_a_model_alone_still_computes_what_it_did(models: Path, tmp_path: Path) -> None:
    """chat, moved into the union of all three: the same logits for the same words, at the words' new ids."""
    import transformers

    text = "merged: {op: stitch, of: [base, chat, code], rules: {\"*\": chat}}"
    path = recipe(models, text, models=["base", "chat", "code"], output="{from: merged, tokenizer: union}")
    done = surgery("run", path, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f).float() for f in (models / "chat", tmp_path / "out"))
    old, new = vocab(models / "chat"), vocab(tmp_path / "out")
    words = [*SENTENCE.split(), "dog"]
    with torch.no_grad():
        first = before(torch.tensor([[old[w] for w in words]])).logits[0]
        second = after(torch.tensor([[new[w] for w in words]])).logits[0]
    shared = sorted(old)
    assert torch.equal(first[:, [old[t] for t in shared]], second[:, [new[t] for t in shared]])


def test_nothing_depends_on_the_process(models: Path, tmp_path: Path) -> None:
    """Union ids and files under three hash seeds and thread counts (mergekit's change from run to run)."""
    text = "merged: {op: average, of: [base, chat, code]}"
    path = recipe(models, text, models=["base", "chat", "code"], output="{from: merged, tokenizer: union, chat_template: auto}")
    seen = []
    for seed in ("0", "1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = surgery("run", path, "-o", tmp_path / seed, "--threads", 1 + int(seed) % 2, env=env)
        assert done.returncode == 0, done.stderr
        seen.append(all_bytes(tmp_path / seed))
    assert seen[0] == seen[1] == seen[2]


def test_what_was_made_here_can_be_aligned_again(models: Path, tmp_path: Path) -> None:
    """Its digests lie beside it; rows read out of order are not taken for damage."""
    for name in ("base", "chat", "code"):
        (tmp_path / name).symlink_to(models / name)
    text = "merged: {op: average, of: [base, chat]}"
    done = surgery("run", recipe(tmp_path, text, models=["base", "chat"], output="{from: merged, tokenizer: union}"),
                   "-o", tmp_path / "first")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "surgery.json").exists()
    text = "merged: {op: average, of: [code, first]}"
    done = surgery("run", recipe(tmp_path, text, models=["code", "first"], output="{from: merged, tokenizer: union}"),
                   "-o", tmp_path / "second")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, code = read_checkpoint(tmp_path / "first"), read_checkpoint(models / "code")
    ids, before = vocab(tmp_path / "second"), vocab(tmp_path / "first")
    made = read_checkpoint(tmp_path / "second")[TABLES[0]].astype(np.float64)
    half = (first[TABLES[0]][before["cat"]].astype(np.float64) + code[TABLES[0]][ids["cat"]].astype(np.float64)) / 2
    np.testing.assert_allclose(made[ids["cat"]], half, rtol=2**-8)
    np.testing.assert_array_equal(made[ids["dog"]], first[TABLES[0]][before["dog"]].astype(np.float64))


def test_without_a_policy_moved_tokens_are_refused_with_the_mend(models: Path) -> None:
    text = "merged: {op: average, of: [base, chat]}"
    done = surgery("plan", recipe(models, text, models=["base", "chat"], output="{from: merged}"))
    assert done.returncode == 2
    assert "tokenizers of base and chat differ: 8 tokens have other ids" in done.stderr
    assert "tokenizer: union" in done.stderr
