"""Fuzz the parsers of what strangers write: headers, index files, recipes, package manifests, torch archives.

    python benchmarks/fuzz.py --seconds 60                 # every target for a minute
    python benchmarks/fuzz.py header recipe --seconds 600 --corpus .bench/corpus --record .bench/fuzz.jsonl
    python benchmarks/fuzz.py --totals .bench/fuzz.jsonl   # the table of docs/security.md

Inputs that reached something new are kept under --corpus, and a later call goes on from them; --record adds a line for each
target to a file, whose sum --totals prints. With atheris installed (`pip install atheris`) the search is guided by coverage of
`surgery`; without, a seeded mutator does what it can. Property: a parser returns, or raises SurgeryError; while it works no
file is opened outside of the target's own folder (those of the interpreter and the system apart), nothing is executed, and
(with atheris) resident memory stays below --rss. Anything else stops the target, leaves its input under --findings, and makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz_targets import TARGETS, Target

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
EXECUTED = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect", "ctypes.dlopen")
SYSTEM = (sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], str(HERE.parent), "/proc/", "/sys/", "/usr/",
          *filter(None, sys.path))  # fmt: skip
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"0", b"-1", b"9999999999999999999", b"1e999", b"NaN", b"null", b"true",
    b"\\ud800",
    b"data_offsets", b"shape", b"dtype", b"F32", b"BF16", b"__metadata__", b"weight_map", b"../", b"&a ", b"*a", b"<<: ",
    b"!!int ", b"!!python/object/apply:os.system ", b"\n", b"  ", b"- ", b"? ", b"models", b"steps", b"output", b"op", b"of",
    b"from", b"merge_method", b"\x80\x02", b"cos\nsystem\n", b"R", b"\x81", b"b", b".", b"\x00" * 8,
]  # fmt: skip


# -- the property --------------------------------------------------------------------------------------------------------


def guarded(call: Target, folder: Path) -> Target:
    """`call` that lets SurgeryError pass and turns anything that is not allowed into an error."""
    from surgery.errors import SurgeryError

    state = {"on": False}

    def audit(event: str, args: Sequence[Any]) -> None:
        if not state["on"]:
            return
        if event in EXECUTED and not (event == "ctypes.dlopen" and args[0] is None):
            raise AssertionError(f"{event} {args!r}")
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((str(folder), *SYSTEM)):
                raise AssertionError(f"opened {path}")

    sys.addaudithook(audit)

    def run(data: bytes) -> None:
        state["on"] = True
        try:
            call(data)
        except SurgeryError:
            pass
        finally:
            state["on"] = False

    return run


# -- engines -------------------------------------------------------------------------------------------------------------


def mutate(data: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(7)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at:at] = rng.choice(TOKENS)
        elif kind == 2:
            del made[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((4, 16, 64))] * rng.choice((1, 2, 50))
        elif kind == 4:
            other = rng.choice(seeds)
            cut = rng.randrange(len(other) + 1)
            made[at:] = other[cut:]
        elif kind == 5:
            token = rng.choice(TOKENS)
            made[at : at + len(token)] = token
        else:
            made[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(made[:65536])


def plain(run: Target, seeds: list[bytes], seconds: float, seed: int, findings: Path) -> int:
    rng, pool, count, end = random.Random(seed), list(seeds), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng.choice(pool), seeds, rng)
        try:
            run(data)
        except BaseException:
            (findings / f"plain-{count}").write_bytes(data)
            raise
        count += 1
        if rng.random() < 0.01:
            pool[rng.randrange(len(seeds), len(pool) + 1) if len(pool) > 200 else len(pool):] = [data]
    return count


def one(name: str, seconds: float, seed: int, findings: Path, rss: int, engine: str, corpus: Path | None) -> None:
    """One target in this process; prints `Done N runs`."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)).resolve()
    os.environ["HF_HOME"] = str(folder / "hub")  # a recipe may name models of the hub: they are looked for here
    import huggingface_hub.errors  # noqa: F401  and what it opens on import is not the target's doing

    try:
        if engine == "atheris":
            import atheris

            with atheris.instrument_imports(include=["surgery", "yaml"]):
                import surgery  # noqa: F401

                call, seeds = TARGETS[name](folder)
            kept = folder / "corpus" if corpus is None else corpus / name
            kept.mkdir(parents=True, exist_ok=True)
            for i, data in enumerate(seeds):
                (kept / f"seed-{i}").write_bytes(data)
            words = folder / "words"
            words.write_text("".join('"' + "".join(rf"\x{b:02x}" for b in token) + '"\n' for token in TOKENS))
            options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-rss_limit_mb={rss}", f"-dict={words}",
                       f"-artifact_prefix={findings}/{name}-", "-timeout=20", "-max_len=16384",
                       "-print_final_stats=1"]  # fmt: skip
            atheris.Setup([sys.argv[0], *options, str(kept)], guarded(call, folder))
            atheris.Fuzz()
        else:
            call, seeds = TARGETS[name](folder)
            print(f"Done {plain(guarded(call, folder), seeds, seconds, seed, findings)} runs", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def child(name: str, args: argparse.Namespace, engine: str) -> dict[str, Any]:
    """One target in a process of its own: what is recorded of it."""
    command = [sys.executable, __file__, name, "--here", "--engine", engine, "--seconds", str(args.seconds)]
    command += ["--seed", str(args.seed), "--rss", str(args.rss), "--findings", str(args.findings.resolve())]
    command += ["--corpus", str(args.corpus.resolve())] if args.corpus else []
    places = os.pathsep.join((str(HERE.parent), str(HERE)))  # atheris does not see editable installs
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, "PYTHONPATH": places})
    seconds = time.monotonic() - began
    said = done.stdout + done.stderr
    counts = re.findall(r"Done (\d+) runs|number_of_executed_units: (\d+)", said)
    coverage = [int(c) for c in re.findall(r"cov: (\d+)", said)]
    if done.returncode:
        print(said[-4000:], file=sys.stderr)
    return {
        "target": name, "engine": engine, "executions": max((int(a or b) for a, b in counts), default=0),
        "seconds": round(seconds, 1), "coverage": [coverage[0], coverage[-1]] if coverage else None,
        "stopped": bool(done.returncode), "python": ".".join(map(str, sys.version_info[:3])),
    }  # fmt: skip


def totals(record: Path) -> str:
    """Executions by target and engine, of all calls that were recorded."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in record.read_text().splitlines():
        found = json.loads(line)
        row = rows.setdefault((found["target"], found["engine"]), {"executions": 0, "seconds": 0.0, "stops": 0, "cov": []})
        row["executions"] += found["executions"]
        row["seconds"] += found["seconds"]
        row["stops"] += found["stopped"]
        row["cov"] += found["coverage"] or []
    lines = ["| target | engine | executions | minutes | coverage | stops |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for (target, engine), row in sorted(rows.items(), key=lambda item: (list(TARGETS).index(item[0][0]), item[0][1])):
        coverage = f"{row['cov'][0]} -> {max(row['cov'])}" if row["cov"] else ""
        minutes = f"{row['seconds'] / 60:.0f}"
        lines.append(f"| {target} | {engine} | {row['executions']:,} | {minutes} | {coverage} | {row['stops']} |")
    lines.append(f"| all | | {sum(r['executions'] for r in rows.values()):,} | | | {sum(r['stops'] for r in rows.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rss", type=int, default=1500, help="MB of resident memory at most")
    parser.add_argument("--findings", type=Path, default=HERE.parent / ".bench" / "fuzz")
    parser.add_argument("--corpus", type=Path, help="keep what reached something new here, and begin with it (atheris)")
    parser.add_argument("--record", type=Path, help="add what was done to this file, a JSON line for each target")
    parser.add_argument("--totals", type=Path, metavar="RECORD", help="print the sum of such a file and end")
    parser.add_argument("--engine", choices=("atheris", "plain"), help="default: atheris where it is installed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one target, in this process
    args = parser.parse_args()
    if args.totals:
        print(totals(args.totals))
        return
    args.findings.mkdir(parents=True, exist_ok=True)
    if args.here:
        one(args.targets[0], args.seconds, args.seed, args.findings, args.rss, args.engine, args.corpus)
        return
    engine = args.engine or ("atheris" if importlib.util.find_spec("atheris") else "plain")
    failed = False
    for name in args.targets or TARGETS:
        found = child(name, args, engine)
        failed = failed or found["stopped"]
        coverage = f", coverage {found['coverage'][0]} -> {found['coverage'][1]}" if found["coverage"] else ""
        stopped = f", STOPPED: see {args.findings}" if found["stopped"] else ""
        count = f"{found['executions']:,} executions in {found['seconds']:.0f} s"
        print(f"{name}: {engine}, {count}{coverage}{stopped}", flush=True)
        if args.record:
            with open(args.record, "a") as file:
                file.write(json.dumps(found) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
