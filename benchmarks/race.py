"""Race `surgery run` against a peer and against the floor of reading and writing the same bytes.

    python benchmarks/race.py --peer PATH_TO_PYTHON

Every figure is a whole process, from start to exit, and the median over the runs. The contenders take turns
within each operation, on warm inputs, each writing into a directory that was not there. The floor is `cat`
of every input file to nowhere, then `cat` of one output's worth of bytes into a new file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import (
    WORK,
    Memory,
    Run,
    common_options,
    family,
    figure,
    floor_command,
    measure,
    median,
    peer_script,
    publish,
    ratio,
    remove,
    say,
    table,
    warm,
    weights,
)
from operations import FOLDERS, OPERATIONS, RACES, peer_config, recipe

HEAD = (
    "operation",
    "ours s",
    "peer s",
    "floor s",
    "ours:peer",
    "ours:floor",
    "ours peak RSS MB",
    "peer peak RSS MB",
)


def race(name: str, args: argparse.Namespace, memory: Memory) -> dict[str, list[Run]]:
    """Run one operation by every contender in turn, and return the runs of each."""
    operation = OPERATIONS[name]
    inputs = operation.paths(args.models)
    outs = {who: args.work / f"{name}-{who}" for who in ("ours", "floor", "peer")}
    commands: dict[str, list] = {"floor": floor_command(inputs, inputs[0], outs["floor"])}
    counts = {"ours": args.runs, "floor": args.runs, "peer": args.peer_runs}
    if args.surgery:
        file = recipe(operation, args.models, args.work / f"{name}.yaml")
        commands["ours"] = [args.surgery, "run", file, "-o", outs["ours"]]
    if args.peer and (config := peer_config(operation, args.models, args.work / f"{name}.peer.yaml")):
        commands["peer"] = [args.peer, config, outs["peer"]]

    warm(weights(*inputs))
    runs: dict[str, list[Run]] = {who: [] for who in counts}
    for turn in range(max(counts.values())):
        for who in ("ours", "floor", "peer"):
            if who not in commands or turn >= counts[who]:
                continue
            remove(outs[who])
            memory.fill()
            run = measure(commands[who], timeout=args.timeout)
            remove(outs[who])
            runs[who].append(run)
            say(f"{name:16} {who:6} {run.seconds:8.2f} s {run.peak_mb:8.0f} MB")
            if not run.ok:
                say(f"{name:16} {who:6} failed: {run.reason}")
                counts[who] = 0
    return runs


def row(name: str, runs: dict[str, list[Run]]) -> list[str]:
    """Return an operation's line of the table."""
    ours, peer, floor = (median(runs[who]) for who in ("ours", "peer", "floor"))
    return [
        name,
        figure(ours),
        figure(peer),
        figure(floor),
        figure(ratio(ours, peer)),
        figure(ratio(ours, floor)),
        figure(median(runs["ours"], "peak_mb"), ".0f"),
        figure(median(runs["peer"], "peak_mb"), ".0f"),
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="family to merge, made if absent [.bench/SIZE]")
    parser.add_argument("--size", default="b1", help="size of the family that is made (see models.py) [b1]")
    parser.add_argument("--peer", type=peer_script, metavar="PYTHON", help="Python of mergekit's environment")
    parser.add_argument("--ops", default=",".join(RACES), help=f"which of {','.join(OPERATIONS)} [the first]")
    parser.add_argument("--runs", type=int, default=3, help="runs of ours and of the floor [3]")
    parser.add_argument("--peer-runs", type=int, default=1, help="runs of the peer [1]")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds before a run is given up [3600]")
    parser.add_argument(
        "--fill-memory", choices=("auto", "yes", "no"), default="auto", help="see measure.Memory [auto]"
    )
    common_options(parser)
    args = parser.parse_args()
    args.ops = [name for name in args.ops.split(",") if name]
    if unknown := [name for name in args.ops if name not in OPERATIONS]:
        parser.error(f"no such operation: {', '.join(unknown)}; there are {', '.join(OPERATIONS)}")
    args.models, args.work = (args.models or WORK / args.size).resolve(), args.work.resolve()
    return args


def main() -> int:
    args = options()
    family(args.models, args.size, len(FOLDERS) - 1)
    if not args.surgery:
        say("no surgery command beside this Python: our columns stay empty")
    results: dict[str, dict[str, list[Run]]] = {}
    with Memory(args.work, args.fill_memory) as memory:
        for name in args.ops:
            results[name] = race(name, args, memory)
    record = {
        name: {who: [run.record() for run in runs[who]] for who in runs} for name, runs in results.items()
    }
    publish(args, table(HEAD, [row(name, runs) for name, runs in results.items()]), {"operations": record})
    return 0 if all(run.ok for by in results.values() for runs in by.values() for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
