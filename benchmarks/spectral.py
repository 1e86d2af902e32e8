"""Time the spectral operators against the SVDs that their definitions ask for, on matrices of a 1.1B Llama.

    python benchmarks/spectral.py --peer PATH_TO_PYTHON

Every figure is a process of its own with one BLAS thread: processor seconds from tensors in memory to the result,
which is the wall clock of an idle machine, and the process's peak resident memory. `svd` is `torch.linalg.svd` of
each delta in float32, and nothing else. The peer is FusionBench: --peer names a Python that imports it. Its
functions get the same deltas; `differs` is the largest difference of two results relative to the largest element.
Without it those columns hold '-'. WUDI is timed over a few steps, and its 300 are worked out from that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import Run, common_options, figure, machine, measure, publish, ratio, remove, say, table

PER_LAYER = {"256x2048": 2, "2048x2048": 2, "5632x2048": 2, "2048x5632": 1}
"""How many matrices of a shape (out x in) a layer of a 1.1B Llama has."""
OPS = ("tsv", "iso_c", "iso_cts", "cart", "svc", "knots", "wudi", "wudi_solve", "tsv_compress", "interference")
BAR = 1.3
"""How much longer than its SVDs TSV-M may take over a layer."""

CHILD = '''
import json, sys, time
import torch
who, name, shape, count, steps, out = sys.argv[1:]  # steps: of wudi
torch.set_num_threads(1)
m, n = map(int, shape.split("x"))
generator = torch.Generator().manual_seed(m + n)
shared = torch.randn(m, n, generator=generator)
deltas = [0.002 * (0.5 * shared + torch.randn(m, n, generator=generator)) for _ in range(int(count))]
torch.linalg.svd(torch.randn(64, 64, generator=generator))

def ours(done):
    import surgery.ops as ops
    if name == "svd":
        return lambda: [torch.linalg.svd(d, full_matrices=False) for d in deltas][0][1]
    if name == "interference":
        from surgery.ops.tsv import interference
        return lambda: torch.tensor(interference(deltas))
    if name == "tsv_compress":
        return lambda: ops.tsv_compress(deltas[0])
    if name == "svc":
        merged = sum(deltas) * 0.3
        return lambda: ops.svc(merged, *deltas)
    more = {"steps": done} if name == "wudi" else {}
    return lambda: ops.registry[name](*deltas, **more)

def peer(done):
    import contextlib, io, logging, warnings
    warnings.simplefilter("ignore")
    tasks = [{"w": d} for d in deltas]
    with contextlib.redirect_stdout(io.StringIO()):
        if name == "tsv":
            from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction as f
            return lambda: f(tasks, accelerator="cpu")["w"]
        if name in ("iso_c", "iso_cts"):
            from fusion_bench.method.isotropic_merging import iso_utils
            more = {"common_space_fraction": 0.8} if name == "iso_cts" else {}
            return lambda: getattr(iso_utils, name)(tasks, accelerator="cpu", **more)["w"]
        if name == "svc":
            from fusion_bench.method.singular_value_calibration import utils
            merged, zero = sum(deltas) * 0.3, torch.zeros(m, n)
            f = utils.subspace_consistency_spectral_calibration_accelerated
            return lambda: f(zero, deltas, merged, alpha=0.1, accelerator=torch.device("cpu"))
        from fusion_bench.method.wudi.wudi import wudi_merging
        return lambda: wudi_merging(tasks, accelerator="cpu", iter_num=done)["w"].detach()

def timed(done):
    work = ours(done) if who == "ours" else peer(done)
    start = time.process_time()
    made = work()
    return time.process_time() - start, made

seconds, made = timed(1)
if name == "wudi":
    seconds = min(seconds, timed(1)[0])
    longer, made = timed(1 + int(steps))
    seconds += max(longer - seconds, 0) / int(steps) * 299
torch.save(made, out)
print("RESULT " + json.dumps({"seconds": seconds}))
'''
PEERS = ("tsv", "iso_c", "iso_cts", "svc", "wudi")


class Figure:
    """What one child reported."""

    def __init__(self, run: Run):
        told = [line for line in run.log.splitlines() if line.startswith("RESULT ")]
        self.run = run
        self.seconds: float | None = json.loads(told[-1][7:])["seconds"] if run.ok and told else None
        self.peak = run.peak_mb if run.ok else None


def child(python: Path | str, who: str, name: str, shape: str, args: argparse.Namespace, out: Path) -> Figure:
    found = Figure(
        measure([python, "-c", CHILD, who, name, shape, str(args.count), str(args.steps), out], timeout=args.timeout)
    )
    say(f"{shape:>10} {name:13} {who:5} {figure(found.seconds)} s {figure(found.peak, '.0f')} MB")
    if not found.run.ok:
        say(f"{shape:>10} {name:13} {who:5} failed: {found.run.reason}")
    return found


def difference(ours: Path, theirs: Path, python: Path | str) -> float | None:
    """Return the largest difference of two saved tensors relative to the largest element."""
    code = (
        "import sys, torch\na, b = (torch.load(f, weights_only=True).double() for f in sys.argv[1:])\n"
        "print(float((a - b).abs().max() / b.abs().max()))"
    )
    run = measure([python, "-c", code, ours, theirs])
    return float(run.log.split()[-1]) if run.ok else None


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(PER_LAYER), help="out x in, comma separated [those of a 1.1B Llama]")
    parser.add_argument("--ops", default=",".join(OPS), help="which operators [all]")
    parser.add_argument("--count", type=int, default=3, help="deltas [3]")
    parser.add_argument("--steps", type=int, default=5, help="steps of wudi that are timed, for a figure of 300 [5]")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="Python that has fusion_bench")
    parser.add_argument("--timeout", type=float, default=900, help="seconds before a child is given up [900]")
    common_options(parser)
    args = parser.parse_args()
    args.ops = [name for name in args.ops.split(",") if name]
    if unknown := [name for name in args.ops if name not in OPS]:
        parser.error(f"no such operator: {', '.join(unknown)}; there are {', '.join(OPS)}")
    args.shapes = [shape for shape in args.shapes.split(",") if shape]
    return args


def peer_python(args: argparse.Namespace) -> Path | None:
    """Return the peer's Python if fusion_bench can be imported there, and say so if not."""
    if args.peer is None:
        say("no --peer: FusionBench's columns stay empty")
        return None
    run = measure([args.peer, "-c", "import fusion_bench"])
    if not run.ok:
        say(f"fusion_bench cannot be imported by {args.peer}: {run.reason}")
        return None
    return args.peer


def main() -> int:
    args = options()
    peer = peer_python(args)
    found: dict[tuple[str, str, str], Figure] = {}
    differs: dict[tuple[str, str], float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.pt"), Path(folder, "theirs.pt")
        for shape in args.shapes:
            found[shape, "svd", "ours"] = child(sys.executable, "ours", "svd", shape, args, ours)
            for name in args.ops:
                found[shape, name, "ours"] = child(sys.executable, "ours", name, shape, args, ours)
                if peer is not None and name in PEERS:
                    found[shape, name, "peer"] = child(peer, "peer", name, shape, args, theirs)
                    if ours.exists() and theirs.exists():
                        differs[shape, name] = difference(ours, theirs, sys.executable)
                    remove(theirs)
                remove(ours)
    rows = []
    for shape in args.shapes:
        alone = found[shape, "svd", "ours"]
        rows.append([shape, "svd", figure(alone.seconds), "1.00", figure(alone.peak, ".0f"), "-", "-"])
        for name in args.ops:
            mine, other = found[shape, name, "ours"], found.get((shape, name, "peer"))
            rows.append(
                [
                    shape,
                    name,
                    figure(mine.seconds),
                    figure(ratio(mine.seconds, alone.seconds)),
                    figure(mine.peak, ".0f"),
                    figure(other.seconds if other else None),
                    figure(differs.get((shape, name)), ".0e"),
                ]
            )
    text = table(["shape", "operator", "s", "/ svd", "peak MB", "peer s", "differs"], rows)
    missed = False
    if set(args.shapes) == set(PER_LAYER) and "tsv" in args.ops:
        layer = [
            sum((found[s, name, "ours"].seconds or 0.0) * k for s, k in PER_LAYER.items()) for name in ("tsv", "svd")
        ]
        missed = not layer[0] <= BAR * layer[1]
        text += f"\n\ntsv over one layer {layer[0]:.1f} s, its SVDs alone {layer[1]:.1f} s: "
        text += f"{figure(ratio(*layer))} (bar {BAR})"
    say(f"load {machine()['load']:.1f}")
    record = {" ".join(key): {"seconds": f.seconds, "peak_mb": f.peak} for key, f in found.items()}
    publish(args, text, {"figures": record, "differs": {" ".join(k): v for k, v in differs.items()}})
    return 1 if missed or not all(f.run.ok for f in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
