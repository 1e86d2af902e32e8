"""Planning and running a merge of two models whose 128k-token vocabularies differ: `python benchmarks/vocabulary.py`.

Two synthetic byte-level BPE tokenizers (128,256 tokens and 280,000 merges each, as large models have them) whose ids are
rotated against each other, one with 200 tokens of its own, around models that are nothing but embedding and head. Times are
wall times of whole processes, of planning, and of what planning consists of.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENS, MERGES, SHIFT, OWN = 128_256, 280_000, 1000, 200


def tokenizer(path: Path, shift: int, own: int) -> None:
    """A tokenizer.json of the usual size; added tokens at the end, as usual."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzĠ"))
    words = [f"{''.join(letters[rng.integers(0, 27, 6)])}{i}" for i in range(TOKENS - 256)]
    ids = {word: (i + shift) % len(words) for i, word in enumerate(words)}
    merges = [f"{words[i % len(words)]} {words[(7 * i) % len(words)]}" for i in range(MERGES)]
    names = [f"<|reserved_{i}|>" for i in range(256)] + [f"<|own_{i}|>" for i in range(own)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(words) + i, "content": name, **flags} for i, name in enumerate(names)]
    model = {"type": "BPE", "vocab": ids, "merges": merges}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}, ensure_ascii=False, indent=2))


def model(folder: Path, shift: int, own: int, hidden: int) -> None:
    """Embedding and head in bfloat16, a config, the tokenizer."""
    folder.mkdir(parents=True)
    rows = TOKENS + own
    size = rows * hidden * 2
    header = {
        name: {"dtype": "BF16", "shape": [rows, hidden], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"))
    }
    raw = json.dumps(header).encode()
    values = np.random.default_rng(shift).standard_normal(1 << 20, np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        left = 2 * size
        while left > 0:
            file.write(block[: min(left, len(block))])
            left -= len(block)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tokenizer(folder / "tokenizer.json", shift, own)


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256, help="width of the tables")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model(folder / "a", 0, 0, options.hidden)
        model(folder / "b", SHIFT, OWN, options.hidden)
        text = "models: {a: a, b: b}\nsteps:\n  out: {op: average, of: [a, b]}\noutput: {from: out, tokenizer: union}\n"
        recipe = folder / "recipe.yaml"
        recipe.write_text(text)
        surgery = [sys.executable, "-m", "surgery.cli"]
        plan = min(timed([*surgery, "plan", str(recipe)]) for _ in range(options.repeats))
        run = min(timed([*surgery, "run", str(recipe), "-o", str(folder / f"out{i}")]) for i in range(options.repeats))
        idle = min(timed([sys.executable, "-c", "import surgery.recipe.native"]) for _ in range(options.repeats))

        from surgery.checkpoint.vocabulary import read_tokens

        began = time.perf_counter()
        for which in "ab":
            read_tokens(folder / which)
        parsing = time.perf_counter() - began
        megabytes = sum((folder / w / "tokenizer.json").stat().st_size for w in "ab") / 1e6
        written = sum(f.stat().st_size for f in (folder / "out0").iterdir()) / 1e6
        print(f"2 models x {TOKENS:,} tokens, tokenizers {megabytes:.0f} MB")
        print(f"surgery plan  {plan:6.2f} s   of which imports {idle:.2f} s, parsing tokenizer.json {parsing:.2f} s")
        print(f"surgery run   {run:6.2f} s   {written:.0f} MB written, {options.hidden} wide")


if __name__ == "__main__":
    main()
