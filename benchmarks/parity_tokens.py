"""Recipes with tokenizers through mergekit and through `surgery run` with `compat: mergekit`: same tokens, same rows?

    python benchmarks/parity_tokens.py --peer PATH_TO_PYTHON_WITH_MERGEKIT [--only WORD] [--work FOLDER]

Makes four tiny llamas with byte-level BPE tokenizers of their own (trained on other texts, other added tokens, one with its ids
turned round, one with padding rows), runs every case of parity_token_cases.yaml through both, and compares: the tokens of
the written tokenizers, the row of every token in embedding and head (by token, since both number new tokens as they like),
padding beyond the tokens, all other tensors, `vocab_size`, and what the chat template makes of a conversation. Exit code 1 if
a case differs that is not said to (DOCUMENTED; docs/mergekit.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from parity_files import ROUNDING, Row, _file, _read, run_ours, run_peer

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXTS = {
    "base": "the cat sat on the mat and the dog ran to the cat " * 3,
    "a": "a quick brown fox jumps over the lazy dog and the cat " * 3,
    "b": "pack my box with five dozen jugs of liquor for the dog " * 3,
    "turned": "",  # base's, in another order
}
ADDED = {"base": ["<s>", "</s>"], "a": ["<s>", "</s>", "<tool>", "<both>"], "b": ["</s>", "<both>", "<b>"], "turned": []}
PADDING = {"base": 0, "a": 3, "b": 0, "turned": 0}
TEMPLATES = {
    "a": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
    "b": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
    "turned": "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
}
_PADDING = "rows without a token"
DOCUMENTED = {
    "source model with padding": (_PADDING, "rows of padding are kept"),
    "chat template of the source": (_PADDING, "rows of padding are kept"),
    "slices, union": ("zeros", "a token that a slice's model lacks gets a row of another model, mergekit's is zeros"),
    **dict.fromkeys(
        (f"chat template {name}" for name in ("alpaca", "llama3", "mistral", "exaone")),
        ("chat templates", "written from the published format; mergekit's has other blanks"),
    ),
}
"""Case -> how it differs from mergekit, and why."""
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}, {"role": "user", "content": "bye"}]


def make_models(folder: Path) -> None:
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for seed, (name, text) in enumerate(TEXTS.items()):
        if text:
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:: 1 if name == "base" else 2]
            made.train_from_iterator([text], BpeTrainer(vocab_size=len(alphabet) + 40, initial_alphabet=alphabet))
        else:
            content = json.loads((folder / "base" / "tokenizer.json").read_text())
            count = len(content["model"]["vocab"])
            content["model"]["vocab"] = {t: count - 1 - i for t, i in content["model"]["vocab"].items()}
            made = Tokenizer.from_str(json.dumps(content))
        made.add_tokens([AddedToken(t, special=t in ("<s>", "</s>"), normalized=False) for t in ADDED[name]])
        rows = made.get_vocab_size() + PADDING[name]
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=rows, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>" if "</s>" in made.get_vocab() else None)
        tokenizer.chat_template = TEMPLATES.get(name)
        tokenizer.save_pretrained(folder / name)


def compare(ours: Path, theirs: Path) -> tuple[float, str | None]:
    """Largest difference in units of rounding, and what else is wrong."""
    mine, peer = _read(ours), _read(theirs)
    if mine.keys() != peer.keys():
        return np.inf, f"tensors differ: {sorted(mine.keys() ^ peer.keys())[:2]}"
    vocabs = [_vocabulary(p) for p in (ours, theirs)]
    if vocabs[0].keys() != vocabs[1].keys():
        return np.inf, f"tokens differ: {sorted(vocabs[0].keys() ^ vocabs[1].keys())[:3]}"
    worst = 0.0
    for name, (value, unit) in mine.items():
        other, theirs_unit = peer[name]
        if unit != theirs_unit:
            return np.inf, f"{name}: another type"
        if name in TABLES:
            order = list(vocabs[0])
            rows = [np.array([v[t] for t in order]) for v in vocabs]
            if len(value) < len(order) or len(other) < len(order):
                return np.inf, f"{name}: {len(value)} and {len(other)} rows for {len(order)} tokens"
            rest = [np.setdiff1d(np.arange(len(x)), r) for x, r in zip((value, other), rows, strict=True)]
            pairs = [(value[rows[0]], other[rows[1]])]
            pairs += [(value[rest[0]], other[rest[1]])] if len(rest[0]) == len(rest[1]) > 0 else []
            if len(rest[1]) != len(rest[0]):
                return np.inf, f"{name}: {len(rest[0])} and {len(rest[1])} {_PADDING}"
            x, y = pairs[0]
            if (dead := ~y.any(axis=1)).any() and x[dead].any() and np.abs(x[~dead] - y[~dead]).max() <= ROUNDING * 2:
                return np.inf, f"{name}: {int(dead.sum())} rows are zeros in theirs"
        else:
            pairs = [(value, other)]
        for x, y in pairs:
            if x.shape != y.shape:
                return np.inf, f"{name}: {x.shape} and {y.shape}"
            worst = max(worst, float(np.abs(x - y).max(initial=0.0)) / (float(np.abs(y).max(initial=0.0)) or 1.0) / unit)
    sizes = [json.loads((p / "config.json").read_text())["vocab_size"] for p in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return np.inf, f"vocab_size {sizes[0]} and {sizes[1]}"
    said = [_said(p) for p in (ours, theirs)]
    if said[0] != said[1]:
        return np.inf, f"chat templates say {said[0]!r} and {said[1]!r}"
    return worst, None


def _vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def _said(folder: Path) -> str | None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return None
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return str(tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="a Python with mergekit 0.1.5")
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    options = parser.parse_args()
    folder = (options.work or Path(tempfile.mkdtemp(prefix="parity-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, str] = yaml.safe_load(Path(__file__).with_name("parity_token_cases.yaml").read_text("utf-8"))
    cases = {name: text for name, text in cases.items() if options.only in name}
    make_models(folder)
    for name in ("theirs", "ours"):
        (folder / name).mkdir(exist_ok=True)
    failed = run_peer(options.peer, cases, folder, COPY_TOKENIZER="1")
    os.chdir(folder)
    rows = []
    for name, text in cases.items():
        if name in failed:
            rows.append(Row(name, "", f"the peer failed: {failed[name]}"))
            continue
        try:
            difference, problem = compare(run_ours(name, text, folder), folder / "theirs" / _file(name))
        except Exception as error:
            rows.append(Row(name, "", f"FAILED: {error}".splitlines()[0]))
            continue
        verdict = "identical" if difference == 0.0 else "equal to rounding" if difference <= 1.0 else "DIFFERENT"
        words, why = DOCUMENTED.get(name, ("", ""))
        if problem is not None:
            verdict = f"differs as documented: {why}" if words and words in problem else f"DIFFERENT: {problem}"
        elif words:
            verdict = "DIFFERENT: agrees, though documented to differ"
        rows.append(Row(name, "" if problem else f"{difference:.2f}", verdict))
    width = max(len(r.case) for r in rows)
    print(f"{'case':<{width}}  {'difference':>10}  verdict (differences in units of the type's rounding)")
    for row in rows:
        print(f"{row.case:<{width}}  {row.difference:>10}  {row.verdict}")
    if options.work is None:
        shutil.rmtree(folder)
    bad = [r for r in rows if r.verdict.startswith(("DIFFERENT", "FAILED"))]
    said = {kind: sum(r.verdict.startswith(kind) for r in rows) for kind in ("differs as", "the peer")}
    agree = len(rows) - len(bad) - sum(said.values())
    rest = f"{said['differs as']} differ as documented, {said['the peer']} the peer cannot run"
    print(f"\n{agree} of {len(rows)} cases agree, {rest}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
