"""What merging models of 671B parameters costs on 1, 8 and 32 machines: a model over measured rates and stated bandwidths.

    python benchmarks/scale.py                                       # the table of docs/scale.md, two minutes
    python benchmarks/scale.py --cores 64 --link 12.5 --storage 100  # other machines

Measured here: what one core needs for a byte (processor seconds of `surgery run` with one thread, on models of --size, inputs
in the page cache), and the processor seconds of planning. Taken from the plan of the 671B models (sparse files with true
headers): bytes read in all passes, and bytes written. Stated: cores of a machine, its link to the storage (GB/s each way), and
what the storage gives to all machines together (GB/s). A merge takes as long as the slowest of computing, reading and writing,
which go on at the same time, and a sixteenth more: a slot has at least eight tasks, and at the end waits for half of one.
Planning is added once for the driver and once for the workers, which plan at the same time.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
from measure import WORK, machine, say, table
from operations import operations, recipe

NAMES = ("linear", "task_arithmetic", "ties", "ties_global", "dare", "slerp", "stock")
TAIL = 1 / 16
GIANTS = ("base", "ft0", "ft1")


def processor_seconds(command: list[str]) -> float:
    """What a process needs of processors, wherever it waits."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(folder: Path, names: list[str], size: str, runs: int) -> dict[str, float]:
    """Bytes that a core moves in a second, by operation; start and planning taken off."""
    home = folder / size
    models.family(home, size, tuned=2)
    rates = {}
    for name, operation in operations(2).items():
        if name not in names:
            continue
        path = recipe(operation, home, folder / f"{name}.yaml")
        plan = _plan(path)
        moved = plan["read_bytes"] + plan["written_bytes"]
        spent = []
        for _ in range(runs):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            whole = processor_seconds(_surgery("run", path, "-o", out, "--threads", "1", "-q"))
            spent.append(whole - processor_seconds(_surgery("plan", path)))
        shutil.rmtree(folder / "out")
        rates[name] = moved / min(spent)
        say(f"{name}: {rates[name] / 1e9:.2f} GB/s a core")
    return rates


def priced(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Bytes and planning seconds of the same operations on 671B models."""
    home = folder / "giants"
    for name in GIANTS:
        if not (home / name).is_dir():
            models.giant(home / name)
    found = {}
    for name, operation in operations(2).items():
        if name in names:
            path = recipe(operation, home, folder / f"giant-{name}.yaml")
            plan, seconds = _plan(path), processor_seconds(_surgery("plan", path))
            found[name] = {"read": plan["read_bytes"], "written": plan["written_bytes"], "plan": seconds}
            say(f"{name}: {plan['read_bytes'] / 1e12:.2f} TB read, planned in {seconds:.1f} s")
    return found


def _surgery(*args: Any) -> list[str]:
    return [sys.executable, "-m", "surgery.cli", *map(str, args)]


def _plan(path: Path) -> dict[str, Any]:
    """read_bytes and written_bytes of a plan."""
    said = json.loads(subprocess.run(_surgery("plan", path, "--json"), check=True, capture_output=True, text=True).stdout)
    return {"read_bytes": said["cost"]["read"], "written_bytes": said["cost"]["written"]}


def hours(cost: dict[str, float], rate: float, count: int, asked: argparse.Namespace) -> tuple[float, str]:
    """(hours on so many machines, what they wait for)."""
    give = min(asked.link * count, asked.storage) * 1e9
    parts = {
        "computing": (cost["read"] + cost["written"]) / (rate * asked.cores * count),
        "reading": cost["read"] / give,
        "writing": cost["written"] / give,
    }
    slowest = max(parts, key=lambda k: parts[k])
    plans = cost["plan"] * (1 if count == 1 else 2)
    return (parts[slowest] * (1 + (TAIL if count > 1 else 0)) + plans) / 3600, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("operations", nargs="*", default=list(NAMES), metavar="OPERATION", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--cores", type=int, default=32, help="of one machine")
    parser.add_argument("--link", type=float, default=3.0, help="GB/s between a machine and the storage, each way")
    parser.add_argument("--storage", type=float, default=40.0, help="GB/s of the storage, to all machines, each way")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--size", default="m100", choices=list(models.LLAMAS))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK / "scale")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    costs, rates = priced(asked.folder, asked.operations), measured(
        asked.folder, asked.operations, asked.size, asked.runs
    )
    rows = []
    for name, cost in costs.items():
        cells = [f"{h * 60:.0f} min ({why})" for h, why in (hours(cost, rates[name], n, asked) for n in asked.machines)]
        read, written = (f"{cost[k] / 1e12:.2f}" for k in ("read", "written"))
        rows.append([name, read, written, f"{rates[name] / 1e9:.2f}", f"{cost['plan']:.0f}", *cells])
    head = ["operation", "TB read", "TB written", "GB/s a core", "plan s", *(f"{n} machines" for n in asked.machines)]
    print(table(head, rows))
    about = machine()
    given = f"{asked.cores} cores and {asked.link:g} GB/s a machine, {asked.storage:g} GB/s of storage"
    print(f"\n{given}; rates measured on {about['system']}, load {about['load']:.0f}")


if __name__ == "__main__":
    main()
