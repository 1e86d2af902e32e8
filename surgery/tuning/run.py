"""A tune file carried out: from a base and data files to a checkpoint, an adapter or a delta package."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from surgery.checkpoint.source import open_source
from surgery.engine.journal import Journal
from surgery.engine.output import JOURNAL, Output
from surgery.errors import Failed, Refused
from surgery.tuning.fit import Fitted, Given, fit
from surgery.tuning.settings import Job
from surgery.tuning.tasks import Task, calibration, data_files, prepare
from surgery.tuning.trainer import Diverged, Progress
from surgery.tuning.write import digests, token, write_adapter, write_checkpoint, write_record

_STATES = ".training"


@dataclass
class Report:
    """What was made. phases: names of phases before the last."""

    out: Path
    fitted: Fitted
    task: Task
    size: int
    warnings: list[str]


def run(job: Job, out: str, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> Report:
    """Train and write. OUT appears when it is whole; until then states are saved in OUT.partial, and `resume` goes on there.

    Raises Refused before anything is written, Failed when the loss is not finite: the weights from before that step are
    left in OUT.partial/last-good.
    """
    if job.settings.device == "cuda" and not torch.cuda.is_available():
        raise Refused("device: cuda was asked for, but torch finds no CUDA device", hint="device: auto, or cpu")
    final = Path(out)
    if job.output == "delta" and final.suffix != ".safetensors":
        raise Refused(f"{out}: a delta package is a file", hint="-o NAME.delta.safetensors")
    if job.output == "delta" and final.is_dir():
        raise Refused(f"{out}: is a directory", hint="choose another -o")
    source = open_source(job.model)
    files = data_files(job.task)
    asked = job.settings.options.get("calibration") if job.settings.method == "lora" else None
    if asked is not None:
        files += data_files({"train": asked})
    if job.settings.method == "columns" and job.settings.options.get("statistics"):
        files += sorted(Path(job.settings.options["statistics"]).glob("*.safetensors"))
    data = digests(files)
    output = Output(final, [Path(p) for p in source.files] + files, resume=resume, overwrite=overwrite)
    set_seed(job.settings.seed)
    task = prepare(job.task, source)
    key = token(job, source, data)
    going_on = output.claim(key, resume=resume)
    folder = output.directory
    try:
        Journal(folder / JOURNAL, key, resume=going_on).close()
        given = Given(task.model, task.train, task.validation, task.collate, _accuracy if task.accuracy else None, task.new,
                      "SEQ_CLS" if task.accuracy else "CAUSAL_LM", stages=task.stages)  # fmt: skip
        if asked is not None:
            given.calibration = calibration(job.task, Path(asked), source, task.model)
        try:
            fitted = fit(given, job.settings, folder / _STATES, save=True, resume=going_on, progress=progress)
        except Diverged as problem:
            raise _stopped(problem, given, source, folder) from None
        except Refused:
            if not going_on:
                output.abandon()
            raise
        size, warnings = _write(job, source, task, fitted, data, output)
    except BaseException:
        output.release()
        raise
    return Report(final, fitted, task, size, warnings)


def _write(
    job: Job, source: Any, task: Task, fitted: Fitted, data: Any, output: Output
) -> tuple[int, list[str]]:
    folder = output.directory
    warnings: list[str] = []
    made = folder if job.output != "delta" else folder / "made"
    if job.output == "adapter":
        write_adapter(fitted.model, source, made, fitted.initial)
    else:
        model = fitted.model.merge_and_unload() if hasattr(fitted.model, "peft_config") else fitted.model
        write_checkpoint(model, source, made)
    write_record(made, job, source, task, fitted, data)
    if job.output == "delta":
        from surgery.delta.pack import pack
        from surgery.inputs import open_node

        choose = _as_trained(job, fitted) if fitted.coded else None
        packed = pack(open_node(job.model), open_node(str(made)), folder / output.final.name, choose=choose)
        warnings += packed.warnings
        packed.path.replace(output.final)
        output.abandon()
        return packed.size, warnings
    shutil.rmtree(folder / _STATES, ignore_errors=True)
    shutil.rmtree(folder / "last-good", ignore_errors=True)
    output.publish()
    return sum(p.stat().st_size for p in output.final.iterdir() if p.suffix == ".safetensors"), warnings


def _as_trained(job: Job, fitted: Fitted) -> Any:
    """Deltas that were trained through a codec are carried by it, as they were coded; all else exactly."""
    from surgery.tuning.through import Trained

    codec = Trained((job.settings.through or {})["codec"], fitted.coded)
    return lambda tensor: (codec, {}) if tensor.name in fitted.coded else None


def _stopped(problem: Diverged, given: Given, source: Any, folder: Path) -> Failed:
    """Keep the weights from before the step, as a checkpoint (or adapter) of its own."""
    good = folder / "last-good"
    shutil.rmtree(good, ignore_errors=True)
    if hasattr(given.model, "peft_config"):
        initial = folder / _STATES / "initial"
        write_adapter(given.model, source, good, initial if initial.exists() else None)
    else:
        write_checkpoint(given.model, source, good)
    return Failed(f"stopped at {problem}; the weights from before that step are in {good}",
                  hint="a lower lr or some warmup; --overwrite starts afresh")  # fmt: skip


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
