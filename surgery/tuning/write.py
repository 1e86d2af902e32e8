"""What a run leaves: a checkpoint in the base's types, an adapter, or a delta package on the base; each with its record."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.sidecar import copy_sidecars, write_json
from surgery.checkpoint.source import Source
from surgery.tuning.fit import Fitted
from surgery.tuning.settings import Job
from surgery.tuning.tasks import Task, quiet
from surgery.version import __version__

RECORD = "tune.json"
FORMAT = "surgery-tune/1"
_TYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


def write_checkpoint(model: Any, source: Source, folder: Path) -> None:
    """The model as transformers stores it, with the base's tokenizer and other files beside it.

    Each tensor gets the type of the base's tensor of that name; what is new the type that most of the base has. Casting
    back is exact for all that was not trained. The model is changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: t.dtype.torch for n, t in source.tensors.items() if t.dtype.torch in _TYPES}
    counts: dict[str, int] = {}
    for name, dtype in stored.items():
        counts[dtype] = counts.get(dtype, 0) + source.tensors[name].numel
    common = max(counts, key=lambda d: counts[d]) if counts else "float32"
    buffers = [(name, value) for name, value in model.named_buffers() if name in stored]
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *buffers]:
            if value.is_floating_point():
                value.data = value.data.to("cpu", _TYPES[stored.get(_stored_name(name, stored), common)])
    model.config.dtype = _TYPES[common]
    with quiet():
        model.save_pretrained(folder)
    _readable(folder)
    copy_sidecars(source, source, folder)


def _readable(folder: Path) -> None:
    """Weight files with the permissions of the others: safetensors writes them for the owner alone."""
    mode = next(folder.glob("*.json")).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _stored_name(name: str, stored: dict[str, str]) -> str:
    """The stored tensor behind a parameter; names may differ by what stands in front."""
    if name in stored:
        return name
    near = [n for n in stored if n.endswith("." + name) or name.endswith("." + n)]
    return near[0] if len(near) == 1 else name


def write_adapter(model: Any, source: Source, folder: Path, initial: Path | None = None) -> None:
    """The adapter as peft stores it; its config names the base as the user did. initial: where it lies as it was taken out of
    the base; what is written then is the change since, of twice the rank, for the base as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for config in model.peft_config.values():
        for key, value in vars(config).items():
            if isinstance(value, set):  # whose order is another one in every process
                setattr(config, key, sorted(value))
        config.base_model_name_or_path = source.location.partition("@")[0] if source.revision else source.location
        config.revision = source.revision
        config.inference_mode = True
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base was changed: this is what undoes it
        more = {} if initial is None else {"path_initial_model_for_weight_conversion": str(initial)}
        model.save_pretrained(folder, save_embedding_layers=False, **more)
    _readable(folder)
    card = folder / "README.md"
    if card.exists():
        card.unlink()  # a template with nothing filled in


def write_record(folder: Path, job: Job, source: Source, task: Task, fitted: Fitted, data: list[dict[str, str]]) -> None:
    """tune.json: how it was made, of what, on what, and how the loss went. The same run gives the same bytes."""
    write_json(
        folder / RECORD,
        {
            "format": FORMAT,
            "version": __version__,
            "base": {"location": source.location, "revision": source.revision, "headers": source.fingerprint},
            "task": job.task,
            "data": data,
            "examples": {"train": len(task.train), "validation": len(task.validation) if task.validation else 0},
            "settings": job.settings.plain(),
            "labels": task.labels,
            "trained": {
                "tensors": len(fitted.trained),
                "entries": fitted.entries,
                "of": fitted.total,
                "new": sorted(task.new),
                **({"adapted": fitted.adapted} if fitted.adapted else {}),
                **({"rounded": fitted.rounded} if fitted.rounded else {}),
            },
            "left_out": task.left_out,
            "history": [{k: v for k, v in h.items() if k != "batches"} for h in fitted.history],
            "phases": {n: [{k: v for k, v in h.items() if k != "batches"} for h in p] for n, p in fitted.phases.items()},
            "final": fitted.final,
        },
    )


def token(job: Job, source: Source, data: list[dict[str, str]]) -> str:
    """What a run that can be resumed must have in common with the one that was cut off."""
    import transformers

    said = [job.model, job.task, job.settings.plain(), job.output, source.fingerprint, data,
            __version__, torch.__version__, transformers.__version__]  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digests(paths: list[Path]) -> list[dict[str, str]]:
    """Name and SHA-256 of every data file."""
    made = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        made.append({"file": path.name, "sha256": digest.hexdigest()})
    return made
