"""Peak memory of packing and applying with the tensors of a 70B model.

    python benchmarks/delta_memory.py                      # 5 minutes on 2 cores, 6 GB of disk
    python benchmarks/delta_memory.py --only exact,fast    # 1 minute

One block's widest matrix (28672 x 8192) with numbers everywhere, the embeddings (128256 x 8192) as a sparse file of which 1 %
of the rows hold numbers, and a vector: how many such tensors a model has does not change what is held at a time. Each command
is a process of its own; its peak is what the kernel counted (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from measure import WORK, measure

LIMIT = 1000.0  # MB
SHAPES = {
    "model.embed_tokens.weight": (128256, 8192),
    "model.layers.0.mlp.gate_proj.weight": (28672, 8192),
    "model.layers.1.mlp.gate_proj.weight": (64, 8192),  # so that there are blocks: outside them nothing is coded with losses
    "model.norm.weight": (8192,),
}
KINDS = {
    "exact": [],
    "fast": ["--fast"],
    "lossy": ["--bits", "1"],
    "progressive": ["--bits", "1", "--progressive"],
    "shards": ["--shard-size", "100MB"],
}
MAKE = """
import sys, numpy as np
path, tuned = sys.argv[1], sys.argv[2] == "tuned"
rng, noise = np.random.default_rng(0), np.random.default_rng(1)
with open(path, "r+b") as file:
    for start, rows, row in eval(sys.argv[3]):
        for a in range(0, rows, 512):
            count = min(512, rows - a)
            x = rng.standard_normal((count, row), dtype=np.float32) * np.float32(0.02)
            moved = noise.standard_normal((count, row), dtype=np.float32) * np.float32(3e-4)
            x = x + moved if tuned else x
            file.seek(start + 2 * a * row)
            file.write((x.view(np.uint32) >> 16).astype("<u2").tobytes())
"""


def model(folder: Path, name: str) -> Path:
    """A checkpoint of one file; made by a process of its own, so that this one stays small."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    file = out / "model.safetensors"
    header: dict[str, object] = {}
    at = 0
    for tensor, shape in SHAPES.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as made:
        made.write(len(raw).to_bytes(8, "little") + raw)
        made.truncate(8 + len(raw) + at)
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    data, vocabulary = 8 + len(raw), SHAPES["model.embed_tokens.weight"]
    full = data + 2 * vocabulary[0] * vocabulary[1]
    gate = SHAPES["model.layers.0.mlp.gate_proj.weight"]
    places = [(data, vocabulary[0] // 100, vocabulary[1]), (full, *gate)]
    subprocess.run([sys.executable, "-c", MAKE, str(file), name, repr(places)], check=True)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="of: " + ", ".join(KINDS))
    parser.add_argument("--work", type=Path, default=WORK / "delta-memory")
    options = parser.parse_args()
    folder, over = options.work, 0
    shutil.rmtree(folder, ignore_errors=True)
    base, tuned = model(folder, "base"), model(folder, "tuned")
    size = (tuned / "model.safetensors").stat().st_size
    print(f"{size / 1e9:.2f} GB of weights\n{'':<20}{'peak MB':>10}{'seconds':>10}{'MB of package':>16}")
    for kind in options.only.split(","):
        package, out = folder / f"{kind}.delta.safetensors", folder / "out"
        command = [sys.executable, "-m", "surgery.cli", "delta"]
        runs = {"pack": measure([*command, "pack", "--base", base, "--model", tuned, "-o", package, "-q", *KINDS[kind]])}
        runs["apply"] = measure([*command, "apply", package, "--base", base, "-o", out, "-q"])
        held = sum(p.stat().st_size for p in folder.glob(f"{kind}*.safetensors"))
        for what, run in runs.items():
            over += not run.ok or run.peak_mb > LIMIT
            note = "" if run.ok else f"  failed: {run.reason}"
            print(f"{kind + ' ' + what:<20}{run.peak_mb:>10.0f}{run.seconds:>10.1f}{held / 1e6:>16.1f}{note}", flush=True)
        for path in folder.glob(f"{kind}*"):
            path.unlink()
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder)
    print(f"{over} over {LIMIT:.0f} MB, or failed" if over else f"all below {LIMIT:.0f} MB")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
