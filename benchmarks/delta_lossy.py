"""Lossy codecs of deltas: rate, error, gain, speed, and what they do to a model's outputs.

    python benchmarks/delta_lossy.py                                      synthetic delta: heavy tails on a low-rank part
    python benchmarks/delta_lossy.py --base B --model M --only '*q_proj*'  real matrices
    python benchmarks/delta_lossy.py --pair main16 --work DIR             logits of the MiniLM pair of `delta_pairs`
    python benchmarks/delta_lossy.py --pair smol16 --work DIR             logits of the decoder of `decoder_pair`
    ... --calib                                                           codecs fitted to texts that the model was tuned on

Speeds are of float32 deltas on one core (process CPU time of one thread). Logit error is the mean squared difference to the
tuned model's logits over that of the base model: 0 is the tuned model, 1 the base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np

import surgery.delta.lossy  # noqa: F401
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.memo import recent, remembered

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dither", {"bits": 0.25}),
    ("dither", {"bits": 0.5}),
    ("dither", {"bits": 1.0}),
    ("dither", {"bits": 2.0}),
    ("dither", {"bits": 3.0}),
    ("svd_wf", {"bits": 0.1}),
    ("svd_wf", {"bits": 0.25}),
    ("svd_wf", {"bits": 0.5}),
    ("svd_wf", {"bits": 1.0}),
    ("svd_wf", {"bits": 2.0}),
    ("dare", {"drop": 0.95}),
    ("dare", {"drop": 0.9}),
    ("hybrid", {}),
    ("hybrid", {"stages": [{"codec": "svd_wf", "bits": 0.25}, {"codec": "dare", "drop": 0.9}]}),
    ("sign", {"scale": "l2", "per": "tensor"}),
    ("sign", {}),
    ("sign", {"per": "row"}),
    ("ternary", {"density": 0.05}),
    ("ternary", {"density": 0.2, "scale": "l2"}),
    ("ternary", {"density": 0.2}),
    ("ternary", {"density": 0.2, "per": "row"}),
    ("lowrank", {"bits": 1.0}),
    ("lowrank", {"bits": 1.0, "factors": "int8"}),
    ("delta_come", {"bits": 1.0}),
    ("delta_come", {"bits": 2.0}),
    ("group", {"bits": 2}),
    ("group", {"bits": 3}),
    ("group", {"bits": 4}),
    ("group", {"bits": 8}),
    ("hadamard", {"bits": 2}),
    ("hadamard", {"bits": 3}),
    ("hadamard", {"bits": 4}),
    ("hadamard", {"bits": 2, "signs": False}),
    ("hadamard", {"bits": 4, "signs": False}),
    ("two_level", {"bits": 4}),
    ("columns", {"count": 8, "quantiser": {"codec": "group", "bits": 2}}),
    ("vq", {"dims": 8}),
    ("vq", {}),
    ("vq", {"dims": 8, "books": 3}),
    ("nf4", {}),
    ("sparse24", {"bits": 4}),
    ("loftq", {"rank": 16}),
    ("quantile", {"bits": 1}),
    ("sparse", {"density": 0.05, "values": "bfloat16"}),
]


CALIBRATED: list[tuple[str, dict[str, Any]]] = [
    ("dither", {"bits": 0.25}),
    ("dither", {"bits": 0.5}),
    ("dither", {"bits": 1.0}),
    ("dither", {"bits": 2.0}),
    ("round", {"bits": 0.25}),
    ("round", {"bits": 0.5}),
    ("round", {"bits": 1.0}),
    ("round", {"bits": 2.0}),
    ("svd_wf", {"bits": 0.1}),
    ("svd_wf", {"bits": 0.25}),
    ("svd_wf", {"bits": 0.5}),
    ("svd_wf", {"bits": 1.0}),
    ("svd_wf", {"bits": 2.0}),
    ("lowrank", {"bits": 1.0}),
    ("delta_come", {"bits": 1.0}),
    ("sign", {}),
    ("ternary", {"density": 0.2}),
    ("group", {"bits": 2}),
    ("group", {"bits": 3}),
    ("hadamard", {"bits": 2}),
    ("hadamard", {"bits": 3}),
    ("columns", {"count": 8, "quantiser": {"codec": "group", "bits": 2}}),
    ("vq", {"dims": 8}),
    ("vq", {}),
    ("nf4", {}),
    ("sparse24", {"bits": 4}),
    ("loftq", {"rank": 16}),
]


def synthetic(rows: int = 2048, columns: int = 1024, seed: int = 0) -> np.ndarray:
    """A delta as fine-tuning makes them: dominant directions, heavy-tailed noise, scales of rows and columns, zeros."""
    rng = np.random.default_rng(seed)
    weight = np.arange(1, 33.0) ** -0.6
    low = rng.standard_normal((rows, 32)) * weight @ rng.standard_normal((32, columns))
    noise = rng.standard_t(5, (rows, columns)) * np.exp(
        0.3 * rng.standard_normal((rows, 1)) + 0.2 * rng.standard_normal(columns)
    )
    return (1e-4 * (0.5 * low + noise) * (rng.random((rows, columns)) > 0.14)).astype(np.float32)


def matrices(base: str, model: str, globs: list[str], most: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, delta) of matching matrices of a real pair."""
    from surgery.checkpoint.source import open_source
    from surgery.delta.interop.files import Values

    below, above = open_source(base), open_source(model)
    names = [n for n, t in below.tensors.items() if len(t.shape) == 2 and any(fnmatch(n, g) for g in globs)]
    with Values(below) as old, Values(above) as new:
        for name in names[:most]:
            yield name, new.floats(name) - old.floats(name)


def described(name: str, options: dict[str, Any]) -> str:
    said = []
    for key, value in options.items():
        if key == "stages":
            value = "+".join(str(stage["codec"]) for stage in value)
        said.append(f"{key} {value}")
    return f"{name} {', '.join(said)}".strip()


def measured(name: str, options: dict[str, Any], deltas: list[tuple[str, np.ndarray]]) -> dict[str, Any]:
    """One codec on all deltas: pooled rate, error and gain, and speeds. `made` holds the decoded deltas."""
    codec = lossy_codec(name)
    size = sum(d.size for _, d in deltas)
    spent = encode = decode = 0.0
    sums: list[tuple[float, float, float]] = []
    largest, made = 0.0, {}
    for key, delta in deltas:
        start = time.process_time()
        coded = codec.encode(delta, key=key, **options)
        encode += time.process_time() - start
        recent.clear()  # of what encoding decoded to measure itself
        remembered.clear()
        start = time.process_time()
        back = np.concatenate(
            [codec.decode(coded, delta.shape, key, a, min(a + (1 << 20), delta.size)) for a in range(0, delta.size, 1 << 20)]
        )
        decode += time.process_time() - start
        d, r = delta.reshape(-1).astype(np.float64), back.astype(np.float64)
        sums.append((float(d @ d), float(d @ r), float((r - d) @ (r - d))))
        spent += 8.0 * coded.nbytes
        largest = max(largest, coded.facts["error"]["max_abs"])
        made[key] = back.reshape(delta.shape)
    dd, dr, ee = (fsum(s[i] for s in sums) for i in range(3))
    row = {"method": described(name, options), "bits": spent / size, "rel_fro": (ee / dd) ** 0.5, "gain": dr / dd}
    row |= {"max_abs": largest, "encode_mb_s": 4e-6 * size / encode, "decode_mb_s": 4e-6 * size / max(decode, 1e-9)}
    return {**row, "made": made}


def fitted(
    name: str, options: dict[str, Any], probe: Any, deltas: list[tuple[str, np.ndarray]], repair: int = 0
) -> dict[str, Any]:
    """One codec fitted to the texts that the model was tuned on: like `measured`, without speeds of decoding."""
    from surgery.delta.calibration.session import calibration
    from surgery.inputs import open_node

    known, codec = {n for n, _ in deltas}, lossy_codec(name)
    base, tuned = (open_node(str(p)) for p in probe.folders)
    start = time.process_time()
    with calibration(base, tuned, str(probe.texts), samples=400, length=64, repair=repair) as session:
        found = session.fit(lambda t: (codec, options) if t.name in known else None)
    seconds, size = time.process_time() - start, sum(d.size for _, d in deltas)
    spent, largest, sums, made = 0.0, 0.0, [0.0, 0.0, 0.0], {}
    for key, delta in deltas:
        used, coded = found.codes[key]
        made[key] = used.decode(coded, delta.shape, key, 0, delta.size).reshape(delta.shape)
        d, r = delta.astype(np.float64), made[key].astype(np.float64)
        sums = [sums[0] + (d * d).sum(), sums[1] + (d * r).sum(), sums[2] + ((r - d) ** 2).sum()]
        spent, largest = spent + 8.0 * coded.nbytes, max(largest, coded.facts["error"]["max_abs"])
    said = described(name, options) + (f", repair {repair}" if repair else "") + ", fitted"
    row = {"method": said, "bits": spent / size, "rel_fro": (sums[2] / sums[0]) ** 0.5, "gain": sums[1] / sums[0]}
    return {**row, "max_abs": largest, "encode_mb_s": 4e-6 * size / seconds, "made": made}


class Decoder:
    """The decoder of `decoder_pair`: next-token logits on held-out texts. accuracy: of the next token."""

    def __init__(self, work: Path, count: int) -> None:
        import decoder_pair
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.folders = decoder_pair.pair(work)
        self.texts = work / "texts.jsonl"
        self.base, self.tuned = (load_file(f / "model.safetensors") for f in self.folders)
        self._model = AutoModelForCausalLM.from_pretrained(self.folders[1], dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folders[0])
        lines = (work / "held.jsonl").read_text().splitlines()[:count]
        self._ids = [torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:96]]) for line in lines]
        self._right = [x.clone() for x in self._logits(self.tuned)]
        self._away = sum(float((a - b).square().sum()) for a, b in zip(self._logits(self.base), self._right, strict=True))

    def _logits(self, weights: dict[str, Any]) -> Iterator[Any]:
        self._model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
        with self._torch.no_grad():
            for ids in self._ids:
                yield self._model(input_ids=ids).logits[0]

    def accuracy(self, weights: dict[str, Any] | None = None) -> float:
        found = self._right if weights is None else self._logits(weights)
        right = sum(int((x[:-1].argmax(-1) == ids[0, 1:]).sum()) for x, ids in zip(found, self._ids, strict=True))
        return right / sum(ids.shape[1] - 1 for ids in self._ids)

    def deltas(self) -> list[tuple[str, np.ndarray]]:
        names = [n for n, t in self.tuned.items() if ".layers." in n and t.ndim == 2]
        return [(n, (self.tuned[n].float() - self.base[n].float()).numpy()) for n in names]

    def score(self, made: dict[str, np.ndarray]) -> dict[str, float]:
        torch, weights = self._torch, dict(self.tuned)
        for name, delta in made.items():
            weights[name] = (self.base[name].float() + torch.from_numpy(delta)).to(self.base[name].dtype)
        off = kl = 0.0
        same = hits = count = steps = 0
        for got, right, ids in zip(self._logits(weights), self._right, self._ids, strict=True):
            off += float((got - right).square().sum())
            p, q = torch.log_softmax(right, -1), torch.log_softmax(got, -1)
            kl += float((p.exp() * (p - q)).sum())
            same, count = same + int((got.argmax(-1) == right.argmax(-1)).sum()), count + len(got)
            hits, steps = hits + int((got[:-1].argmax(-1) == ids[0, 1:]).sum()), steps + len(got) - 1
        return {"accuracy": hits / steps, "agree": same / count, "stored": off / self._away, "kl": kl / count}


class Probe:
    """The tuned MiniLM encoder with its head; logits of any weights under that head.

    The pairs keep encoders only. The head is made again: the same random start (so that accuracy depends on the encoder's
    delta), trained for as long and at the same rate as it was beside the encoder, on the features of the tuned encoder.
    """

    def __init__(self, work: Path, pair: str, count: int) -> None:
        import delta_pairs
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        self.folders = delta_pairs.pair(work, pair)
        self.base, self.tuned = (self._read(p) for p in self.folders)
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(delta_pairs._home())
        torch.manual_seed(0)
        self._model = AutoModel.from_config(AutoConfig.from_pretrained(delta_pairs._home())).eval()
        self._head = torch.nn.Linear(self._model.config.hidden_size, delta_pairs.CLASSES)
        train, held = delta_pairs.examples()
        self._held = held[:count]
        self.texts = work / f"{pair}-calib.jsonl"
        ids = [self._tokenizer(text, truncation=True, max_length=64)["input_ids"] for text, _ in train[:480]]
        self.texts.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids))
        self._labels = torch.tensor([c for _, c in self._held])
        features, labels = self._features(self.tuned, train[:3000]), torch.tensor([c for _, c in train[:3000]])
        regime = delta_pairs.REGIMES[pair]
        optimiser = torch.optim.AdamW(self._head.parameters(), lr=regime.rate, weight_decay=0.0)
        for step in range(regime.stop or regime.steps):
            optimiser.param_groups[0]["lr"] = regime.rate * (1 - step / regime.steps)
            batch = torch.randint(len(features), (16,))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(self._head(features[batch]), labels[batch]).backward()
            optimiser.step()
        self._reference = self.logits(self.tuned)
        self._away = float((self.logits(self.base) - self._reference).square().mean())

    def _read(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(folder / "model.safetensors")

    def _features(self, weights: dict[str, Any], examples: list[tuple[str, int]]) -> Any:
        torch = self._torch
        self._model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
        found = []
        with torch.no_grad():
            for at in range(0, len(examples), 64):
                texts = [t for t, _ in examples[at : at + 64]]
                inputs = self._tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
                mask = inputs["attention_mask"][..., None]
                found.append((self._model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    def logits(self, weights: dict[str, Any]) -> Any:
        with self._torch.no_grad():
            return self._head(self._features(weights, self._held))

    def accuracy(self, weights: dict[str, Any] | None = None) -> float:
        found = self._reference if weights is None else self.logits(weights)
        return float((found.argmax(1) == self._labels).float().mean())

    def deltas(self) -> list[tuple[str, np.ndarray]]:
        """The matrices inside the encoder: float32 differences."""
        names = [n for n, t in self.tuned.items() if "encoder.layer" in n and t.ndim == 2]
        return [(n, (self.tuned[n].float() - self.base[n].float()).numpy()) for n in names]

    def score(self, made: dict[str, np.ndarray]) -> dict[str, float]:
        """Of the tuned model with these deltas in its matrices; `stored`: rounded to the storage type too, as `apply` does."""
        torch = self._torch
        weights = dict(self.tuned)
        for name, delta in made.items():
            weights[name] = self.base[name].float() + torch.from_numpy(delta)
        found = self.logits(weights)
        rounded = self.logits({n: t.to(self.base[n].dtype) for n, t in weights.items()})
        return {
            "accuracy": float((found.argmax(1) == self._labels).float().mean()),
            "agree": float((found.argmax(1) == self._reference.argmax(1)).float().mean()),
            "logit": float((found - self._reference).square().mean()) / self._away,
            "stored": float((rounded - self._reference).square().mean()) / self._away,
        }


def automatic(deltas: list[tuple[str, np.ndarray]], bits: float) -> dict[str, Any]:
    """`--codec auto`: one budget over all matrices."""
    from surgery.delta.lossy.auto import allocate

    found = allocate(dict(deltas), bits=bits)
    size, spent, made, sums = sum(d.size for _, d in deltas), 0.0, {}, [0.0, 0.0, 0.0]
    largest = 0.0
    for name, delta in deltas:
        choice = found.choices[name]
        assert choice.codec is not None
        codec = lossy_codec(choice.codec)
        coded = codec.encode(delta, key=name, **choice.options)
        made[name] = codec.decode(coded, delta.shape, name, 0, delta.size).reshape(delta.shape)
        d, r = delta.astype(np.float64), made[name].astype(np.float64)
        sums = [sums[0] + (d * d).sum(), sums[1] + (d * r).sum(), sums[2] + ((r - d) ** 2).sum()]
        spent, largest = spent + 8.0 * coded.nbytes, max(largest, coded.facts["error"]["max_abs"])
    row = {
        "method": f"auto bits {bits}",
        "bits": spent / size,
        "rel_fro": (sums[2] / sums[0]) ** 0.5,
        "gain": sums[1] / sums[0],
    }
    return {**row, "max_abs": largest, "made": made}


COLUMNS = {
    "bits": "{:.3f}", "rel_fro": "{:.3f}", "gain": "{:.3f}", "max_abs": "{:.1e}",
    "encode_mb_s": "{:.0f}", "decode_mb_s": "{:.0f}",
    "accuracy": "{:.3f}", "agree": "{:.4f}", "logit": "{:.2e}", "stored": "{:.2e}", "kl": "{:.2e}",
}  # fmt: skip


def printed(row: dict[str, Any], columns: list[str]) -> None:
    cells = [COLUMNS[c].format(row[c]) if c in row else "" for c in columns]
    print(f"| {row['method']} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--model")
    parser.add_argument("--only", action="append", help="glob of tensor names; repeatable")
    parser.add_argument("--most", type=int, default=4, help="matrices of a real pair")
    parser.add_argument("--pair", help="a regime of delta_pairs: main16, hot16, ...")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--examples", type=int, default=1000, help="held-out examples for logits")
    parser.add_argument("--method", action="append", help="only codecs of this name; repeatable")
    parser.add_argument("--calib", action="store_true", help="codecs fitted to texts, on top of those without data")
    parser.add_argument("--only-calib", action="store_true", help="only those")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:  # threads that wait would count as process time
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    probe: Any = None
    if given.pair:
        decoder = given.pair == "smol16"
        probe = Decoder(given.work, min(given.examples, 24)) if decoder else Probe(given.work, given.pair, given.examples)
    if probe:
        deltas = probe.deltas()
    elif given.base:
        deltas = list(matrices(given.base, given.model, given.only or ["*"], given.most))
    else:
        deltas = [("synthetic", synthetic())]
    decoder = isinstance(probe, Decoder)
    shown = ("accuracy", "agree", "stored", "kl" if decoder else "logit")
    columns = [c for c in COLUMNS if c in (shown if probe else ()) or c not in ("accuracy", "agree", "logit", "stored", "kl")]
    if probe:
        print(f"tuned model: accuracy {probe.accuracy():.3f}, base under the same head {probe.accuracy(probe.base):.3f}")
    print(f"{len(deltas)} matrices, {sum(d.size for _, d in deltas)} weights\n")
    print(f"| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    rows = []
    jobs: list[Callable[[], dict[str, Any]]] = []
    wanted = [(n, o) for n, o in METHODS if not given.method or n in given.method]
    if not given.only_calib:
        jobs += [lambda n=n, o=o: measured(n, o, deltas) for n, o in wanted]  # type: ignore[misc]
        if not given.method or "auto" in given.method:
            jobs += [lambda b=b: automatic(deltas, b) for b in (1.0, 2.0)]  # type: ignore[misc]
    if given.calib or given.only_calib:
        wanted = [(n, o) for n, o in CALIBRATED if not given.method or n in given.method]
        jobs += [lambda n=n, o=o: fitted(n, o, probe, deltas) for n, o in wanted]  # type: ignore[misc]
        if not given.method or "repair" in given.method:
            jobs += [lambda: fitted("group", {"bits": 2}, probe, deltas, repair=8)]
    for job in jobs:
        row = job()
        made = row.pop("made")
        if probe:
            row |= probe.score(made)
        rows.append(row)
        printed(row, columns)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
