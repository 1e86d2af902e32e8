"""Making a statistics checkpoint: load the model, run texts through it, write what was seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import open_source
from surgery.errors import Refused
from surgery.statistics.angular import angles
from surgery.statistics.fisher import collect_fisher
from surgery.statistics.gram import collect_gram, groups, linear_layers
from surgery.statistics.inputs import ROWS, collect_inputs
from surgery.statistics.live import Live, load
from surgery.statistics.manifest import COLLECTED, Manifest, content_digest
from surgery.statistics.sensitivity import collect_sensitivity, labels_of
from surgery.statistics.texts import file_digest, tokenised
from surgery.version import __version__


@dataclass
class Collected:
    """What was made: tensors and bytes written, texts and tokens seen, and what has no statistics and why."""

    tensors: int = 0
    nbytes: int = 0
    texts: int = 0
    tokens: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def collect(
    model: str,
    out: str | Path,
    *,
    kind: str,
    data: str | Path,
    samples: int = 256,
    length: int = 512,
    seed: int = 0,
    memory: int = 4 * 10**9,
    only: Sequence[str] = ("*",),
    batch: int = 16,
    rows: int = ROWS,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """Collect statistics of the model at `model` (a directory or hub id that transformers loads) over the texts in `data`.

    kind: one of `manifest.COLLECTED`. samples: texts at most. length: tokens a text is cut to. memory: bytes for
    Gram matrices at a time; more passes over the texts if that is less than all. only: globs of tensor names. batch: texts in
    a gradient, for sensitivity. rows: of a layer's inputs that are kept, for inputs. progress: (texts done, in all). Raises
    Refused. Writes the checkpoint and its statistics.json to the directory `out`, which appears when it is whole.
    """
    if kind not in COLLECTED:
        raise Refused(f"kind must be one of {', '.join(COLLECTED)}, got {kind!r}")
    if samples < 1 or length < 1 or rows < 1:
        raise Refused("samples, length and rows must be at least 1")
    out, data, source = Path(out), Path(data), open_source(model)
    digest = content_digest(source)
    if not data.is_file():
        raise Refused(f"{data}: no such file")
    with _target(out, overwrite) as folder:
        live = load(source)
        assert source.directory is not None
        length = min(length, live.longest) if live.longest else length
        texts = tokenised(data, source.directory, samples=samples, length=length, vocabulary=live.vocabulary)
        made = Collected(texts=len(texts), tokens=sum(map(len, texts)))
        if kind == "angular":
            parts, total = _angular(live, source, texts, made, progress)
        elif kind == "sensitivity":
            parts, total = _sensitivity(live, texts, data, batch, only, made, progress)
        else:
            parts, total = _parts(live, texts, kind, seed, memory, rows, only, made, progress)
        _write(folder, parts, made)
        Manifest(
            kind=kind,
            samples=len(texts),
            tokens=total(),
            length=length,
            seed=seed,
            model={"source": model, "headers": source.fingerprint, "content": digest},
            data={"file": data.name, "sha256": file_digest(data)},
            version=__version__,
        ).write(folder)
    return made


def _parts(
    live: Live,
    texts: Sequence[Sequence[int]],
    kind: str,
    seed: int,
    memory: int,
    rows: int,
    only: Sequence[str],
    made: Collected,
    progress: Callable[[int, int], None],
) -> tuple[Iterable[dict[str, Any]], Callable[[], int]]:
    """The tensors in parts that are written as they come, and, once they have, over how many tokens they are means."""
    done = 0

    def step(total: int) -> Callable[[], None]:
        def count() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        return count

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in only)

    if kind in ("gram", "inputs"):
        layers, lacking = linear_layers(live)
        made.left_out |= dict.fromkeys(lacking, "shared with the embedding, or not stored under a name of its own")
        layers = [layer for layer in layers if wanted(layer.name)]
        if not layers:
            raise Refused(f"{type(live.model).__name__}: no linear layer to collect from", hint="is --only too narrow?")
        if kind == "inputs":
            seen = collect_inputs(live, texts, layers, rows, seed, step(len(texts)))
            return _reached([seen], layers, made), lambda: made.tokens
        count = step(len(texts) * len(groups(layers, memory)))
        return _reached(collect_gram(live, texts, layers, memory, count), layers, made), lambda: made.tokens
    found, predictions = collect_fisher(live, texts, seed, step(len(texts)))
    known = {id(p): n for n, p in live.model.named_parameters()}
    made.left_out |= {n: "not stored under a name of its own" for i, n in known.items() if i not in live.names}
    return [{n: t for n, t in found.items() if wanted(n)}], lambda: predictions


def _sensitivity(
    live: Live, texts: Sequence[Sequence[int]], data: Path, batch: int, only: Sequence[str], made: Collected, progress: Any
) -> tuple[Iterable[dict[str, Any]], Callable[[], int]]:
    done = iter(range(1, len(texts) + 1))
    labels = labels_of(data, live, len(texts)) if live.head == "classes" else None
    found, batches = collect_sensitivity(live, texts, labels, batch, lambda: progress(next(done), len(texts)))
    return [{n: t for n, t in found.items() if any(fnmatchcase(n, g) for g in only)}], lambda: batches


def _angular(
    live: Live, source: Any, texts: Sequence[Sequence[int]], made: Collected, progress: Any
) -> tuple[Iterable[dict[str, Any]], Callable[[], int]]:
    """`runs.n`: the distance over n blocks, of every block that such a run can begin with."""
    import torch

    found = angles(live, source, texts, progress=progress)
    parts = {f"runs.{n}": torch.tensor(row, dtype=torch.float64) for n, row in found.distances.items()}
    return [parts], lambda: len(texts)


def _reached(parts: Iterable[dict[str, Any]], layers: Sequence[Any], made: Collected) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for part in parts:
        seen |= part.keys()
        yield part
    made.left_out |= {layer.name: "no text reached it" for layer in layers if layer.name not in seen}


def _write(folder: Path, parts: Iterable[dict[str, Any]], made: Collected) -> None:
    """One file per part, and an index where there are several."""
    from safetensors.torch import save_file

    files: dict[Path, list[str]] = {}
    for number, part in enumerate(p for p in parts if p):
        path = folder / f"part-{number}.safetensors"
        save_file({n: t.contiguous() for n, t in part.items()}, path, metadata={"format": "pt"})
        files[path] = list(part)
        made.tensors += len(part)
        made.nbytes += sum(t.numel() * t.element_size() for t in part.values())
    if not files:
        raise Refused("no statistics were collected", hint="is --only too narrow?")
    if len(files) == 1:
        next(iter(files)).rename(folder / "model.safetensors")
        return
    weights: dict[str, str] = {}
    for number, (path, names) in enumerate(files.items(), 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / name)
        weights |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": made.nbytes}, "weight_map": dict(sorted(weights.items()))}
    write_json(folder / "model.safetensors.index.json", index)


@contextmanager
def _target(out: Path, overwrite: bool) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes `out` if all goes well and is removed if not."""
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise Refused(f"{out}: already holds something", hint="choose another -o, or --overwrite to replace it whole")
    if out.exists() and overwrite and not (out / "statistics.json").is_file():
        raise Refused(f"{out}: is no statistics checkpoint; it is not overwritten", hint="choose another -o")
    folder = out.with_name(out.name + ".partial")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise Refused(f"{folder}: is in the way", hint="another run is writing it, or one was killed: remove it") from None
    except OSError as problem:
        raise Refused(f"{folder}: cannot be written: {problem.strerror}") from None
    try:
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
