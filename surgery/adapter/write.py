"""Writing a delta as a PEFT adapter: low-rank factors, and tensors that are kept in full."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.adapter.decompose import criteria_of, each, made_of
from surgery.adapter.file import GrowingFile
from surgery.adapter.find import CONFIG
from surgery.adapter.items import PREFIX, Item, Row
from surgery.adapter.svd import Criterion
from surgery.adapter.values import Values
from surgery.checkpoint.dtypes import DType
from surgery.checkpoint.sidecar import write_json
from surgery.engine.output import JOURNAL, Output
from surgery.errors import Refused
from surgery.graph.expr import Expr

_INNER = "gate_up_proj"  # wrapped first by PEFT, so the inner of two parameters of one module


@dataclass
class Written:
    """An adapter on disk."""

    out: Path
    rows: list[Row]
    nbytes: int
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """What the config says beside the tensors' shapes. targets: names that match exactly the modules written, if known."""

    base: str | None = None
    task: str | None = None
    fan_in_fan_out: bool = False
    targets: Callable[[Sequence[str]], Sequence[str]] | None = None
    note: str = ""


def write_adapter(
    items: Sequence[Item],
    full: Mapping[str, Expr],
    out: Path,
    *,
    values: Values,
    criterion: Criterion,
    method: str,
    dtype: DType,
    header: Header,
    inputs: Iterable[Path],
    overwrite: bool = False,
    threads: int = 1,
    budget: int | None = None,
    rows: Sequence[Row] = (),
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write `items` as factors and `full` (tensor name -> value) as they are to the folder `out`, whole or not at all.

    values: over all their expressions. budget: bytes that the adapter may have; then ranks are shared out between tensors so
    that the squared error summed over all of them is least. rows: what is known about tensors that are not written.
    """
    tell = progress or (lambda n: None)
    target = Output(out, inputs, resume=False, overwrite=overwrite)
    target.claim("", resume=False)
    try:
        (target.directory / JOURNAL).touch()
        criteria = criteria_of(items, full, values, criterion, method, dtype, threads, budget)
        written = _write(items, full, target.directory, values, criteria, method, dtype, header, threads, tell)
        written.out, written.rows = out, [*rows, *written.rows]
        (target.directory / "README.md").write_text(_card(written, header), "utf-8")
        target.publish()
    except BaseException:
        target.abandon()
        raise
    return written


# -- the folder ----------------------------------------------------------------------------------------------------------


def _write(
    items: Sequence[Item],
    full: Mapping[str, Expr],
    directory: Path,
    values: Values,
    criteria: Mapping[str, Criterion],
    method: str,
    dtype: DType,
    header: Header,
    threads: int,
    progress: Callable[[int], None],
) -> Written:
    nests = _nests(items)
    saved, biases = _modules(full, items)
    keys = {n: PREFIX + _full_key(n, items) for n in full}
    names = [f"{PREFIX}{i.module}.base_layer.lora_embedding_A" for i in items for _ in range(2)]
    file = GrowingFile(directory / "adapter_model.safetensors", [*names, *keys.values()])
    rows: list[Row] = []
    try:
        found = each(items, lambda i: made_of(i, values, criteria[i.name], method, dtype, nests[i.name]), threads)
        for item, made in zip(items, found, strict=True):
            for key, shape, raw in made.tensors:
                file.add(key, dtype, shape, [raw])
            rows.append(made.row)
            progress(item.delta.numel)
        for name, expr in full.items():
            before = file.nbytes
            file.add(keys[name], expr.dtype, expr.shape, values.stored(expr))
            rows.append(Row(name, expr.shape, "full", nbytes=file.nbytes - before))
            progress(expr.numel)
        file.finish()
    except BaseException:
        file.close()
        raise
    if not any(r.kind in ("low-rank", "full") for r in rows):
        raise Refused("nothing differs: the adapter would be empty", hint="are these the model and base you mean?")
    ranks = {r.name: r.rank for r in rows if r.kind == "low-rank"}
    config = _config([i for i in items if i.name in ranks], ranks, saved, bool(biases), header)
    write_json(directory / CONFIG, config)
    return Written(directory, rows, file.nbytes, _warnings(config, saved, biases))


def _nests(items: Sequence[Item]) -> dict[str, int]:
    """How many wrappers PEFT puts between a module and each of its parameters."""
    homes: dict[str, list[Item]] = {}
    for item in items:
        homes.setdefault(item.module, []).append(item)
    made = {}
    for module, mine in homes.items():
        if len(mine) > 2 or (len(mine) == 2 and not any(i.parameter == _INNER for i in mine)):
            raise Refused(f"`{module}` has {len(mine)} parameters; in which order PEFT wraps them is not known")
        for item in mine:
            made[item.name] = int(len(mine) == 2 and item.parameter == _INNER)
    return made


def _modules(full: Mapping[str, Expr], items: Sequence[Item]) -> tuple[list[str], list[str]]:
    """(modules to save, biases that are new). A module is saved whole; a bias can be on its own."""
    modules: dict[str, None] = {}
    biases = []
    for name in full:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{module}.weight" not in full:
            biases.append(name)
        elif leaf in ("weight", "bias"):
            modules[module] = None
        else:
            raise Refused(
                f"`{name}` cannot be kept in an adapter: it is no weight or bias of a module",
                hint=f"leave it out: --skip '{name}'",
            )
    return list(modules), biases


def _full_key(name: str, items: Sequence[Item]) -> str:
    module, _, leaf = name.rpartition(".")
    wrapped = leaf == "bias" and any(i.module == module for i in items)
    return f"{module}.base_layer.{leaf}" if wrapped else name


def _config(
    items: Sequence[Item], ranks: Mapping[str, int], saved: Sequence[str], biases: bool, header: Header
) -> dict[str, Any]:
    """Scale 1 everywhere (alpha is the rank), also for runtimes that do not look at patterns."""
    experts = [ranks[i.name] for i in items if i.expert]
    r = experts[0] if experts else max(ranks.values(), default=1)  # the rank of stacked experts cannot be in a pattern
    odd = {_pattern(i.path): ranks[i.name] for i in items if ranks[i.name] != r}
    modules = [i.module for i in items if not i.by_parameter]
    parameters = [i.path for i in items if i.by_parameter]
    targets = list(header.targets(modules)) if header.targets and modules else modules
    return {
        "peft_type": "LORA",
        "task_type": header.task,
        "base_model_name_or_path": header.base,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "target_parameters": parameters or None,
        "modules_to_save": list(saved) or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": header.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(path: str) -> str:
    """As a regular expression that matches `path`; dots stay plain, as everywhere in such configs."""
    return path if re.fullmatch(r"[\w.]+", path) else re.escape(path)


def _warnings(config: Mapping[str, Any], saved: Sequence[str], biases: Sequence[str]) -> list[str]:
    made = []
    if saved or biases:
        what = f"modules in full ({len(saved)})" if saved else f"biases ({len(biases)})"
        made.append(f"the adapter holds {what}: peft loads such adapters, vLLM does not")
    return made


def _card(written: Written, header: Header) -> str:
    lines = ["---", "library_name: peft", *([f"base_model: {header.base}"] if header.base else []), "tags: [lora]", "---", ""]
    low = [r for r in written.rows if r.kind == "low-rank"]
    if low:
        worst = max(low, key=lambda r: r.error)
        ranks = [r.rank for r in low]
        lines += [header.note, "", f"{len(low)} tensors of rank {min(ranks)} to {max(ranks)}; largest relative error "]
        lines[-1] += f"{worst.error:.3g} (`{worst.name}`)."
    full = [r for r in written.rows if r.kind == "full"]
    if full:
        lines.append(f"{len(full)} tensors in full.")
    return "\n".join([*lines, ""])
