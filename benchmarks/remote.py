"""Measure merging models that lie behind a network: a web server on this machine, with latency and a bound on its rate.

    python benchmarks/remote.py                                  # two models of 600 MB at 200 MB/s and 30 ms
    python benchmarks/remote.py --megabytes 100 --rate 50 --latency 100

* merge: `surgery run` of an average of two models, straight from the server; against the time that their bytes take at the
  server's rate (`limit`), and against fetching them with one plain request after another (`fetched`).
* headers: `surgery plan` of a model of 163 shards.

The server is a process of its own, in Python: far beyond 500 MB/s it is what is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from measure import HERE, measure

RATIO = 1.3  # the bar: merge seconds / limit
SHARDS = 163


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600, help="of each of the two models")
    parser.add_argument("--rate", type=float, default=200.0, help="MB/s that the server sends in all")
    parser.add_argument("--latency", type=float, default=30.0, help="milliseconds before each answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.rate, asked.latency)
        return
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-"))
    try:
        failed = bench(work, asked)
    finally:
        shutil.rmtree(work)
    sys.exit(failed)


def bench(work: Path, asked: argparse.Namespace) -> int:
    size = sum(make(work / "web" / name, asked.megabytes, shards=2) for name in "ab")
    make(work / "web" / "many", 1, shards=SHARDS)
    options = ["--rate", str(asked.rate), "--latency", str(asked.latency)]
    command = [sys.executable, __file__, "--serve", str(work / "web"), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdin is not None
    try:
        url = server.stdout.readline().strip()
        (work / "merge.yaml").write_text(
            f"models: {{a: {url}/a/, b: {url}/b/}}\nsteps:\n  m: {{op: average, of: [a, b]}}\noutput: {{from: m}}\n"
        )
        (work / "many.yaml").write_text(
            f"models: {{m: {url}/many/}}\noutput: {{from: m}}\n"
        )
        limit = size / (asked.rate * 1e6)
        merges, inner, peaks, sent, requests = [], [], [], 0, 0
        for _ in range(asked.runs):
            shutil.rmtree(work / "out", ignore_errors=True)
            before = state(url)
            run = measure([sys.executable, "-m", "surgery.cli", "run", work / "merge.yaml", "-o", work / "out"])
            after = state(url)
            if not run.ok:
                print(run.log, file=sys.stderr)
                return 1
            merges.append(run.seconds)
            inner.append(float(run.log.rpartition(" in ")[2].partition(" s ")[0]))
            peaks.append(run.peak_mb)
            sent, requests = after["sent"] - before["sent"], after["requests"] - before["requests"]
        began = time.perf_counter()
        for name in "ab":
            for file in sorted((work / "web" / name).glob("*.safetensors")):
                with urllib.request.urlopen(f"{url}/{name}/{file.name}") as answer:
                    while answer.read(1 << 20):
                        pass
        fetched = time.perf_counter() - began
        plans = [measure([sys.executable, "-m", "surgery.cli", "plan", work / "many.yaml"]) for _ in range(asked.runs)]
    finally:
        server.stdin.close()
        server.wait()
    merge = statistics.median(merges)
    print(f"| {asked.rate:.0f} MB/s, {asked.latency:.0f} ms | seconds | of the limit |")
    print("| --- | --- | --- |")
    print(f"| limit: {size / 1e6:.0f} MB at the server's rate | {limit:.2f} | 1.00 |")
    print(f"| fetched, nothing done with it | {fetched:.2f} | {fetched / limit:.2f} |")
    print(f"| merge, whole process | {merge:.2f} ({min(merges):.2f} to {max(merges):.2f}) | {merge / limit:.2f} |")
    running = statistics.median(inner)
    print(f"| of which running, without start and planning | {running:.2f} | {running / limit:.2f} |")
    print(f"\n{requests} requests, {sent / size:.3f} of the weights' bytes sent, peak memory {max(peaks):.0f} MB")
    seconds = statistics.median(p.seconds for p in plans)
    print(f"`plan` of {SHARDS} shards: {seconds:.2f} s ({'ok' if all(p.ok for p in plans) else plans[0].reason})")
    return int(merge > RATIO * limit)


def make(folder: Path, megabytes: int, *, shards: int) -> int:
    """A model of bf16 matrices with random bits that are finite numbers. Returns the bytes of its weights."""
    import numpy as np

    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), 512
    each = max(1, megabytes * 1_000_000 // shards // (rows * 2048 * 2))
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        shape = [rows, 2048] if megabytes > 1 else [2, 2]
        length = 2 * shape[0] * shape[1]
        names = [f"model.layers.{shard * each + i}.mlp.up_proj.weight" for i in range(each)]
        places = [[i * length, (i + 1) * length] for i in range(each)]
        entries = {n: {"dtype": "BF16", "shape": shape, "data_offsets": p} for n, p in zip(names, places, strict=True)}
        header = json.dumps(entries).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for _ in names:
                bits = rng.integers(0, 1 << 16, length // 2, np.uint16)
                out.write((bits & 0x807F | (bits & 0x0700) << 3 | 0x3800).astype(np.uint16).tobytes())
        weight_map |= dict.fromkeys(names, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def serve(folder: Path, rate: float, latency: float) -> None:
    """Until standard input ends. `/state` answers what has been sent so far."""
    sys.path.insert(0, str(HERE.parent / "tests" / "remote"))
    from server import Fault, Request, Server

    with Server(folder, latency=latency / 1e3, rate=rate * 1e6) as server:

        def tell(request: Request) -> Fault | None:
            if request.path != "/state":
                return None
            return Fault(status=200, headers={"X-Sent": str(server.sent), "X-Requests": str(len(server.log))})

        server.faults.append(tell)
        print(server.url, flush=True)
        sys.stdin.read()


def state(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/state") as answer:
        return {"sent": int(answer.headers["X-Sent"]), "requests": int(answer.headers["X-Requests"])}


if __name__ == "__main__":
    main()
