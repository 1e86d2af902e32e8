"""Whole recipes through mergekit and through `surgery run` with `compat: mergekit`: do the files hold the same numbers?

    python benchmarks/parity_files.py --peer PATH_TO_PYTHON_WITH_MERGEKIT [--only WORD] [--work FOLDER]

Makes four tiny random llamas (a base and three fine-tunes of it, float32), runs every case of parity_cases.yaml
through both, and prints a table: case, largest absolute difference, verdict. Methods that draw random numbers are
run at density 1, where nothing is drawn. Exit code 1 if any case differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

LAYERS, HIDDEN, VOCABULARY = 4, 32, 64
ROUNDING = 4e-7
"""Largest difference, relative to the largest value of a tensor, that float32 arithmetic in another order may make."""

PEER = """
import json, os, sys, traceback
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, yaml
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks
from mergekit.graph import Executor
options = MergeOptions(copy_tokenizer="COPY_TOKENIZER" in os.environ, write_model_card=False, quiet=True)
said = {}
for name, (recipe, out) in json.load(sys.stdin).items():
    try:
        if "\\n---\\n" in recipe:
            made, needs = load_config(recipe, out + ".parts")
            tasks = make_tasks(made, needs, options, out + ".parts", out, False)
            Executor(tasks, math_device="cpu", storage_device="cpu").execute()
        else:
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), out, options=options)
    except Exception as problem:
        said[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
print("\\n" + json.dumps(said))
"""


@dataclass
class Row:
    """One line of the table."""

    case: str
    difference: str
    verdict: str


def make_models(folder: Path) -> None:
    """`base`, its fine-tunes `a`, `b` and `c`, and `far`, which is none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b", "c", "far")):
        torch.manual_seed(0 if name != "far" else 99)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                spread = 0.0 if name == "base" else 0.005 * seed
                p += spread * torch.randn(p.shape, generator=generator)
        model.save_pretrained(folder / name)


def run_peer(python: str, cases: Mapping[str, str], folder: Path, **more: str) -> dict[str, str]:
    """Run every case in one process of mergekit's; returns what went wrong, by case. more: environment variables."""
    jobs = {name: (text, str(folder / "theirs" / _file(name))) for name, text in cases.items()}
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **more}
    done = subprocess.run(
        [python, "-c", PEER], input=json.dumps(jobs), cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_ours(name: str, text: str, folder: Path) -> Path:
    """Plan and run a case with `compat: mergekit` in every document."""
    from surgery.engine.plan import make_plan
    from surgery.engine.run import run
    from surgery.recipe.native import read_recipe

    path = folder / f"{_file(name)}.yaml"
    path.write_text("\n---\n".join(f"compat: mergekit\n{part}" for part in text.split("\n---\n")))
    read = read_recipe(path, {})
    out = folder / "ours" / _file(name)
    run(make_plan(read.node, read.settings), out, overwrite=True)
    return out


def compare(ours: Path, theirs: Path) -> tuple[float, float, str | None]:
    """Largest absolute difference, the same in units of the tensor's own rounding, and what else is wrong."""
    mine, peer = _read(ours), _read(theirs)
    if mine.keys() != peer.keys():
        return np.inf, np.inf, f"tensors differ: {sorted(mine.keys() ^ peer.keys())[:2]}"
    absolute = relative = 0.0
    for name, (value, unit) in mine.items():
        other, theirs_unit = peer[name]
        if value.shape != other.shape or unit != theirs_unit:
            return np.inf, np.inf, f"{name}: another shape or type"
        difference = float(np.abs(value - other).max(initial=0.0))
        scale = float(np.abs(other).max(initial=0.0)) or 1.0
        absolute, relative = max(absolute, difference), max(relative, difference / scale / unit)
    layers = [json.loads((p / "config.json").read_text())["num_hidden_layers"] for p in (ours, theirs)]
    return absolute, relative, None if layers[0] == layers[1] else f"config says {layers[0]} and {layers[1]} layers"


def _read(folder: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Tensors in float64, each with the relative difference that counts as rounding in its type."""
    from safetensors.torch import load_file

    units = {"torch.float32": ROUNDING, "torch.float64": 1e-15, "torch.bfloat16": 2 * 2**-8, "torch.float16": 2 * 2**-11}
    return {
        name: (tensor.double().numpy(), units[str(tensor.dtype)])
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="a Python with mergekit 0.1.5")
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    options = parser.parse_args()
    folder = (options.work or Path(tempfile.mkdtemp(prefix="parity-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, str] = yaml.safe_load(Path(__file__).with_name("parity_cases.yaml").read_text("utf-8"))
    cases = {name: text for name, text in cases.items() if options.only in name}
    make_models(folder)
    (folder / "theirs").mkdir(exist_ok=True)
    failed = run_peer(options.peer, cases, folder)
    os.chdir(folder)
    (folder / "ours").mkdir(exist_ok=True)
    rows = []
    for name, text in cases.items():
        if name in failed:
            rows.append(Row(name, "", f"the peer failed: {failed[name]}"))
            continue
        try:
            absolute, relative, problem = compare(run_ours(name, text, folder), folder / "theirs" / _file(name))
        except Exception as error:
            rows.append(Row(name, "", f"FAILED: {error}".splitlines()[0]))
            continue
        verdict = f"DIFFERENT: {problem}" if problem else "identical" if absolute == 0.0 else "equal to rounding"
        rows.append(Row(name, f"{absolute:.1e}", verdict if relative <= 1.0 or problem else "DIFFERENT"))
    width = max(len(r.case) for r in rows)
    print(f"{'case':<{width}}  {'max |diff|':>10}  verdict")
    for row in rows:
        print(f"{row.case:<{width}}  {row.difference:>10}  {row.verdict}")
    if options.work is None:
        shutil.rmtree(folder)
    bad = [r for r in rows if r.verdict.startswith(("DIFFERENT", "FAILED"))]
    print(f"\n{len(rows) - len(bad)} of {len(rows)} cases agree")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
