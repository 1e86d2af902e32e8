"""Kill runs at random moments, go on with --resume, and compare the result with that of a run left alone.

    python benchmarks/kill.py                        # 200 kills, about 20 minutes on 2 cores
    python benchmarks/kill.py --kills 40 --markdown kill.md

A run is `surgery run` in a process of its own, killed with SIGKILL. Half of the moments are uniform over the time an
undisturbed run takes; the other half wait for something to appear on disk (the first finished tensor, the config, the output
itself) and strike a random instant after it, so that the short phases at the end are hit as well. A quarter of the runs are
killed a second time while they resume. What is found on disk after a kill says which phase was hit.

Each kill must hold: what is at OUT is nothing, the former output, or the new one, never a mixture; an unfinished output is
refused by `surgery.open` and by `AutoModelForCausalLM.from_pretrained`; and after --resume, OUT holds, file for file and byte
for byte, what the undisturbed run wrote, and nothing of ours is left beside it. Exit status 1 if one of them does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from measure import WORK, say, table

PHASES = ("planning", "first pass", "second pass", "finishing", "publishing", "over before")
SCRATCH = (".lock", ".replacing", "journal.jsonl")
STEPS = """
  da: {op: diff, of: [ft0, base]}
  db: {op: diff, of: [ft1, base]}
  t: {op: ties, of: [da, db], density: 0.3, trim: global}
  out: {op: add, of: [base, t], weight: 0.7}
"""
VARIANTS = {"one shard": ("5GB", False), "many shards": ("8MB", False), "many shards, --overwrite": ("8MB", True)}

Hashes = dict[str, str]


class Case:
    """One recipe with its undisturbed output."""

    def __init__(self, folder: Path, name: str, shard_size: str, overwrite: bool) -> None:
        self.name, self.overwrite = name, overwrite
        self.folder = folder / name.replace(",", "").replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe = self.folder / "recipe.yaml"
        models = "".join(f"  {m}: {folder / 'models' / m}\n" for m in ("base", "ft0", "ft1"))
        self.recipe.write_text(f"models:\n{models}steps:{STEPS}output: {{from: out, shard_size: {shard_size}}}\n")
        whole = self.folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        self.seconds = min(self._timed(whole) for _ in range(2))
        self.wanted = hashes(whole)
        self.former = self.folder / "former"
        shutil.rmtree(self.former, ignore_errors=True)
        shutil.copytree(folder / "models" / "ft0", self.former)
        self.before = hashes(self.former)

    def _timed(self, out: Path) -> float:
        began = time.perf_counter()
        done = self.start(out, "--overwrite").wait()
        if done:
            raise SystemExit(f"the undisturbed run of `{self.name}` failed with exit code {done}")
        return time.perf_counter() - began

    def start(self, out: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "surgery.cli", "run", str(self.recipe), "-o", str(out), "-q", "--threads", "2"]
        return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)


def hashes(folder: Path) -> Hashes:
    """Every file of a folder by its content, without what a run works with."""
    return {
        str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in SCRATCH
    }


def triggers(out: Path) -> list[Callable[[], bool]]:
    """Things that appear one after another; the earliest are found by uniform moments often enough."""
    partial = out.with_name(out.name + ".partial")
    replaced = out.with_name(out.name + ".replaced")

    def lines(count: int) -> Callable[[], bool]:
        def seen() -> bool:
            try:
                return (partial / "journal.jsonl").read_bytes().count(b"\n") > count
            except OSError:
                return False

        return seen

    def stands(path: Path) -> Callable[[], bool]:
        return path.exists

    return [
        lines(0), lines(1), lines(20), stands(partial / "config.json"), stands(partial / "README.md"),
        stands(partial / "surgery.json"), stands(out / "surgery.json"), stands(replaced),
    ]  # fmt: skip


def kill(process: subprocess.Popen[str], case: Case, out: Path, rng: random.Random) -> bool:
    """Kill a run at a random moment; False if it was over before."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 1.05 * case.seconds))
    else:
        appeared = rng.choice(triggers(out))
        while process.poll() is None and not appeared():
            pass
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.002), rng.uniform(0, 0.03)]))
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def phase(out: Path, tensors: int) -> str:
    """Where a run was when it was killed, from what it left."""
    partial = out.with_name(out.name + ".partial")
    if (out / "journal.jsonl").exists() or (partial / ".replacing").exists():
        return "publishing"
    if not partial.exists():
        return "over before" if (out / "surgery.yaml").exists() else "planning"
    if any((partial / name).exists() for name in ("config.json", "README.md", "surgery.json")):
        return "finishing"
    try:
        lines = (partial / "journal.jsonl").read_bytes().count(b"\n")
    except OSError:
        return "planning"
    return "finishing" if lines > tensors else "second pass" if lines > 1 else "first pass"


def looks_finished(partial: Path, wanted: Hashes) -> str | None:
    """What takes an unfinished output for weights although they are not all there; None if nothing does."""
    import surgery

    if not partial.is_dir():
        return None
    there = hashes(partial)
    if all(there.get(name) == digest for name, digest in wanted.items() if name.endswith(".safetensors")):
        return None  # every weight is in its place: only the rename was missing
    try:
        surgery.open(partial)
    except surgery.Refused:
        pass
    else:
        return "surgery.open"
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(partial)
    except Exception:
        return None
    return "transformers"


def one(case: Case, work: Path, rng: random.Random) -> dict[str, Any]:
    """One run killed, looked at, resumed and compared."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    out = work / "out"
    if case.overwrite:
        shutil.copytree(case.former, out)
    tensors = len(json.loads((case.folder / "whole" / "surgery.json").read_text())["tensors"])
    options = ["--overwrite"] if case.overwrite else []
    alive = kill(case.start(out, *options), case, out, rng)
    found = {"case": case.name, "phase": phase(out, tensors) if alive else "over before", "kills": 1, "problems": []}
    problems: list[str] = found["problems"]
    _look(case, out, problems)
    if alive and rng.random() < 0.25:
        kill(case.start(out, "--resume", *options), case, out, rng)
        found["kills"] = 2
        _look(case, out, problems)
    _go_on(case, out, options, problems)
    if not out.is_dir() or hashes(out) != case.wanted:
        problems.append("other bytes than the undisturbed run")
    left = sorted(p.name for p in work.iterdir()) + sorted(p.name for p in out.glob("*") if p.name in SCRATCH)
    if left != ["out"]:
        problems.append(f"left behind: {left}")
    return found


def _look(case: Case, out: Path, problems: list[str]) -> None:
    if out.exists() and hashes(out) not in (case.wanted, case.before if case.overwrite else case.wanted):
        problems.append("OUT is neither the former nor the new output")
    taken = looks_finished(out.with_name(out.name + ".partial"), case.wanted)
    if taken:
        problems.append(f"{taken} takes the unfinished output for a model")


def _go_on(case: Case, out: Path, options: list[str], problems: list[str]) -> None:
    """What a user does: --resume, or a plain run where it says that nothing had begun, or nothing where it is done."""
    if out.is_dir() and not (out / "journal.jsonl").exists() and hashes(out) == case.wanted:
        return
    process = case.start(out, "--resume", *options)
    _, said = process.communicate()
    if process.returncode == 2 and "no unfinished run to resume" in said:
        process = case.start(out, *options)
        _, said = process.communicate()
    if process.returncode:
        problems.append(f"resuming ended with {process.returncode}: {said.strip()[-300:]}")


def make_models(folder: Path) -> None:
    """Three models of 37 MB, if they are not there."""
    import models

    models.LLAMAS["kill"] = {"hidden": 384, "inner": 1024, "layers": 8, "heads": 6, "kv": 3, "vocab": 12000}
    models.family(folder, "kill", tuned=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=WORK / "kill")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--json", type=Path, help="also write every kill there")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    make_models(args.folder / "models")
    cases = [Case(args.folder, name, *how) for name, how in VARIANTS.items()]
    say("undisturbed: " + ", ".join(f"{c.name} {c.seconds:.2f} s" for c in cases))
    found: list[dict[str, Any]] = []
    while sum(f["phase"] != "over before" for f in found) < args.kills:
        found.append(one(cases[len(found) % len(cases)], args.folder / "work", rng))
        if found[-1]["problems"] or len(found) % 20 == 0:
            say(f"{len(found)}: {found[-1]}")
    shutil.rmtree(args.folder / "work")
    text = summary(found)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    sys.exit(any(f["problems"] for f in found))


def summary(found: list[dict[str, Any]]) -> str:
    """Kills by phase and kind of output, and how many ended in the same bytes."""
    killed = [f for f in found if f["phase"] != "over before"]
    counts = Counter((f["case"], f["phase"]) for f in killed)
    good = sum(not f["problems"] for f in killed)
    rows = [[name, *(str(counts[name, p]) for p in PHASES[:-1])] for name in VARIANTS]
    rows.append(["all", *(str(sum(counts[name, p] for name in VARIANTS)) for p in PHASES[:-1])])
    twice = sum(f["kills"] == 2 for f in killed)
    return "\n".join(
        [
            table(["killed while", *PHASES[:-1]], rows),
            "",
            f"{good} of {len(killed)} killed runs ended in the same bytes after --resume; {twice} of them were killed twice.",
        ]
    )


if __name__ == "__main__":
    main()
