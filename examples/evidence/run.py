"""Try published claims again at small scale, and print docs/evidence.md.

    python examples/evidence/run.py                        # everything; no network
    python examples/evidence/run.py soups wise --seeds 5   # some of it
    python examples/evidence/run.py > docs/evidence.md

Progress goes to stderr, plots and figures to the work folder (default `.evidence/`), where base models and fine-tunes are kept
from run to run. Figures are written as soon as a script is done with a seed: a run that was ended goes on with --resume, which
keeps those whose script, rig and surgery are as they were. --so-far measures nothing and prints the page of what is kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # seeds run side by side; two threads for a small model only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from evidence.claims import Figures, Script, script  # noqa: E402
from evidence.page import RIGS, page  # noqa: E402
from evidence.plots import plot  # noqa: E402

NOT_SYSTEMS = {"__init__", "claims", "page", "plots", "run"}


def names() -> list[str]:
    """Of all scripts, in the order of the page."""
    found = {p.stem for p in HERE.glob("*.py")} - NOT_SYSTEMS
    return sorted(found, key=lambda n: (list(RIGS).index(load(n).RIG), n))


def load(name: str) -> Script:
    return script(importlib.import_module(f"evidence.{name}"))


def rig_of(name: str, work: Path, seed: int) -> object:
    """The rig that a script asks for: class `Digits` of `rig.digits`; without one the seed alone."""
    return getattr(importlib.import_module(f"rig.{name}"), name.title())(work, seed) if name else seed


def measured(name: str, seed: int, work: Path) -> tuple[Figures, float]:
    """One script on one seed, in a process that may be used again. Seconds that it took beside it."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began, found = time.perf_counter(), load(name)
    return found.measure(rig_of(found.RIG, work, seed)), time.perf_counter() - began


def stamp(name: str) -> str:
    """Changes when anything does that figures depend on."""
    from rig.store import digest, sources

    import surgery

    rooms = [p for root in (Path(surgery.__file__).parent, HERE.parents[1] / "ops") for p in root.rglob("*.py")]
    return digest([*scripts_of(name), *sources(load(name).RIG), *rooms])


def scripts_of(name: str) -> list[Path]:
    """The script, and those whose functions it takes."""
    found = {name}
    waiting = [name]
    while waiting:
        text = (HERE / f"{waiting.pop()}.py").read_text("utf-8")
        new = set(re.findall(r"^from evidence\.(\w+) import", text, re.M)) - NOT_SYSTEMS - found
        found |= new
        waiting += sorted(new)
    return [HERE / f"{n}.py" for n in sorted(found)]


def main() -> None:
    options = arguments()
    chosen, work, seeds = options.names or names(), options.work.resolve(), range(options.seeds)
    kept = work / "figures"
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, Figures]] = {name: {} for name in chosen}
    jobs = []
    for seed in seeds:
        for name in chosen:
            file = kept / f"{name}-{seed}.json"
            saved = json.loads(file.read_text()) if (options.resume or options.so_far) and file.exists() else {}
            if saved.get("stamp") == stamp(name):
                found[name][seed] = saved["figures"]
            else:
                jobs.append((name, seed))
    began, failed = time.perf_counter(), list[str]()
    if options.so_far:
        chosen = [name for name in chosen if found[name]]
        if not chosen:
            sys.exit(f"{kept} holds no figures of this code yet")
    elif jobs:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            waiting = {pool.submit(measured, name, seed, work): (name, seed) for name, seed in jobs}
            for done in as_completed(waiting):
                name, seed = waiting[done]
                if (problem := done.exception()) is not None:
                    failed.append(name)
                    print(f"{name}, seed {seed}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
                    continue
                figures, seconds = done.result()
                found[name][seed] = figures
                keep(kept / f"{name}-{seed}.json", {"stamp": stamp(name), "figures": figures})
                print(f"{name}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(dict.fromkeys(failed))}; what was measured is kept, --resume goes on")
    scripts = {name: load(name) for name in chosen}
    listed = {name: [found[name][seed] for seed in seeds if seed in found[name]] for name in chosen}
    for name in chosen:
        plot(work / "plots" / f"{name}.png", scripts[name], listed[name])
    print(page(scripts, listed), end="")
    print(f"{time.perf_counter() - began:.0f} s; plots: {work / 'plots'}", file=sys.stderr)


def keep(file: Path, made: dict[str, object]) -> None:
    """Written in one piece, so that an interruption leaves no half of it."""
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(made))
    scratch.replace(file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default all")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (2)")
    parser.add_argument("--work", type=Path, default=Path(".evidence"), help="folder for models, figures and plots")
    parser.add_argument("--resume", action="store_true", help="keep figures of earlier runs of the same code")
    parser.add_argument("--so-far", action="store_true", help="measure nothing: the page of what is kept")
    made = parser.parse_args()
    for name in made.names:
        if name not in names():
            parser.error(f"there is no script {name!r}; there are {', '.join(names())}")
    return made


if __name__ == "__main__":
    main()
