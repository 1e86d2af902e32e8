"""Tasks on text: the live model of a checkpoint for a task, and the examples of its files as token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from surgery.checkpoint.source import Source
from surgery.checkpoint.structure import structure_of
from surgery.errors import Refused
from surgery.tuning.rows import Examples, Padded, Row, read_rows

_LONGEST = 512  # tokens, where neither the task nor the model says


@dataclass
class Task:
    """What is trained on what. new: parameters without base values; left_out: stored tensors that the model has no use for."""

    model: Any
    train: Examples
    validation: Examples | None
    collate: Any
    accuracy: bool
    labels: list[str] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)  # of a stream of tasks: how many of the examples each has
    new: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


def data_files(task: Mapping[str, Any]) -> list[Path]:
    """The files that a task reads. Raises Refused for one that is not there."""
    found = [*_trains(task), *([Path(task["validation"])] if "validation" in task else [])]
    for path in found:
        if not path.is_file():
            raise Refused(f"{path}: there is no such file")
    return found


def _trains(task: Mapping[str, Any]) -> list[Path]:
    """The files that are trained on, in the order of a stream."""
    said = task["train"]
    return [Path(p) for p in said] if isinstance(said, list) else [Path(said)]


def _joined(parts: Sequence[list[Any]], task: Mapping[str, Any]) -> tuple[list[list[Any]], list[int]]:
    """([training examples, validation examples if there are any], sizes of a stream's stages) of one list per file."""
    count = len(_trains(task))
    stages = [len(p) for p in parts[:count]]
    return [[x for p in parts[:count] for x in p], *parts[count:]], stages if count > 1 else []


def prepare(task: Mapping[str, Any], source: Source) -> Task:
    """Load the model and the examples. The model is float32 (float64 where weights are stored so). Raises Refused."""
    return _classification(task, source) if task["kind"] == "classification" else _causal(task, source)


def calibration(task: Mapping[str, Any], path: Path, source: Source, model: Any) -> Examples:
    """The examples of another file as the task's model sees them; labels are not needed. Raises Refused."""
    encode = _Encoder(source, model, task.get("length"))
    if task["kind"] == "classification":
        return Examples([encode.example(row, task["text"], task.get("pair")) for row in read_rows(path)])
    items = list(_lines(path, encode) if path.suffix == ".jsonl" else _blocks(path, encode, False))
    if not items:
        raise Refused(f"{path}: holds no text of two tokens or more")
    return Examples([{k: v for k, v in item.items() if k != "answer"} for item in items])


# -- classification ----------------------------------------------------------------------------------------------------------


def _classification(task: Mapping[str, Any], source: Source) -> Task:
    files = data_files(task)
    splits = [read_rows(path) for path in files]
    said = [[row.label(task["label"]) for row in rows] for rows in splits]
    count = len(_trains(task))
    names = _labels(sorted({label for labels in said[:count] for label in labels}, key=_natural), source)
    known = {name: i for i, name in enumerate(names)}
    for rows, labels in zip(splits, said, strict=True):
        for row, label in zip(rows, labels, strict=True):
            if label not in known:
                raise Refused(f"{row.path}:{row.line}: label `{label}` is not among those of {files[0]}: {', '.join(names)}")
    if len(names) < 2:
        raise Refused(f"{files[0]}: has one label only, `{names[0]}`", hint="there is nothing to tell apart")
    model, new, left_out = _load(
        source, "AutoModelForSequenceClassification", num_labels=len(names),
        id2label=dict(enumerate(names)), label2id=known,
    )  # fmt: skip
    encode = _Encoder(source, model, task.get("length"))
    made = []
    for rows, labels in zip(splits, said, strict=True):
        items = []
        for row, label in zip(rows, labels, strict=True):
            items.append({**encode.example(row, task["text"], task.get("pair")), "labels": known[label]})
        made.append(items)
    examples, stages = _joined(made, task)
    pad = encode.pad()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad
    train, validation = Examples(examples[0]), Examples(examples[1]) if len(examples) > 1 else None
    return Task(model, train, validation, Padded(pad), True, names, stages, new, left_out)


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.lstrip("-").isdigit() and label.isascii() else (1, 0, label)


def _labels(found: list[str], source: Source) -> list[str]:
    """The model's own labels if it knows all that were found, else those."""
    own = (source.config or {}).get("id2label") or {}
    try:
        names = [str(own[key]) for key in sorted(own, key=int)]
    except (TypeError, ValueError):
        return found
    return names if set(found) <= set(names) and len(set(names)) == len(names) else found


# -- causal language models --------------------------------------------------------------------------------------------------


def _causal(task: Mapping[str, Any], source: Source) -> Task:
    files = data_files(task)
    model, new, left_out = _load(source, "AutoModelForCausalLM")
    if new:
        raise Refused(f"{source.location}: lacks `{min(new)}`, which would be random", hint="give a causal language model")
    encode = _Encoder(source, model, task.get("length"))
    made = []
    for path in files:
        items = list(_lines(path, encode) if path.suffix == ".jsonl" else _blocks(path, encode, task["completion_only"]))
        for item in items:
            answer = item.pop("answer", None)
            if task["completion_only"]:
                item["labels"] = answer if answer is not None else _no_prompt(path)
        if not items:
            raise Refused(f"{path}: holds no text of two tokens or more")
        made.append(items)
    examples, stages = _joined(made, task)
    train, validation = Examples(examples[0]), Examples(examples[1]) if len(examples) > 1 else None
    return Task(model, train, validation, Padded(encode.pad()), False, [], stages, new, left_out)


def _no_prompt(path: Path) -> NoReturn:
    raise Refused(f"{path}: completion_only needs `prompt` and `completion` in every line")


def _blocks(path: Path, encode: _Encoder, completion_only: bool) -> Iterator[dict[str, Any]]:
    """A text file as one stream of tokens, cut into blocks of the full length; the last one may be shorter."""
    if completion_only:
        _no_prompt(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as problem:
        raise Refused(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})") from None
    ids = encode.text(text, path, 1)
    for at in range(0, len(ids), encode.length):
        block = ids[at : at + encode.length]
        if len(block) > 1:
            yield {"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)}


def _lines(path: Path, encode: _Encoder) -> Iterator[dict[str, Any]]:
    """Lines with `text`, `input_ids`, or `prompt` and `completion`. `answer`: labels of the completion alone."""
    for row in read_rows(path):
        ids = row.ids("input_ids")
        if ids is not None:
            prompt, completion = [], encode.checked(ids, row.path, row.line)
        elif "prompt" in row.values or "completion" in row.values:
            prompt = encode.text(row.text("prompt"), path, row.line, end=False)
            completion = encode.text(row.text("completion"), path, row.line, start=False)
        else:
            prompt, completion = [], encode.text(row.text("text"), path, row.line)
        whole = (prompt + completion)[: encode.length]
        if len(whole) < 2:
            continue
        made = {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": list(whole)}
        if prompt:
            if len(prompt) >= len(whole):
                raise Refused(f"{path}:{row.line}: the prompt alone has {len(prompt)} tokens; no completion is left of "
                              f"{encode.length}", hint="raise task.length")  # fmt: skip
            made["answer"] = [-100] * len(prompt) + whole[len(prompt) :]
        yield made


# -- both --------------------------------------------------------------------------------------------------------------------


class _Encoder:
    """Text to token ids, by the checkpoint's tokenizer; checks ids against the model's embeddings."""

    def __init__(self, source: Source, model: Any, length: int | None) -> None:
        self._source = source
        self._tokenizer: Any = None
        self._rows = model.get_input_embeddings().weight.shape[0]
        self._config = model.config
        limit: int | None = getattr(model.config, "max_position_embeddings", None)
        if limit and model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit = limit - (model.config.pad_token_id or 0) - 1  # their positions start behind the padding's
        if length is not None and limit and length > limit:
            raise Refused(f"task.length: {length} tokens, but {source.location} takes {limit} at most")
        self.length: int = length or min(_LONGEST, limit or _LONGEST)

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._source.directory, trust_remote_code=False)
            except Exception as problem:
                first = (str(problem).splitlines() or [""])[0]
                raise Refused(f"{self._source.location}: its tokenizer cannot be loaded ({type(problem).__name__}: {first})",
                              hint='give token ids instead: .jsonl lines with "input_ids"') from None  # fmt: skip
        return self._tokenizer

    def checked(self, ids: Sequence[int], path: Path, line: int) -> list[int]:
        """The ids, all below the number of embeddings."""
        worst = max(ids, default=0)
        if worst >= self._rows:
            raise Refused(f"{path}:{line}: token {worst}, but the model has {self._rows} embeddings",
                          hint=f"the tokenizer of {self._source.location} does not belong to its weights")  # fmt: skip
        return list(ids)

    def text(self, text: str, path: Path, line: int, *, start: bool = True, end: bool = True) -> list[int]:
        """A text's ids with the tokenizer's own marks (not for a continuation) and, at its end, the end-of-text token."""
        ids = list(self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"])
        stop = self.tokenizer.eos_token_id
        if stop is not None:
            while not end and ids and ids[-1] == stop:
                ids.pop()
            if end and (not ids or ids[-1] != stop):
                ids.append(stop)
        return self.checked(ids, path, line)

    def example(self, row: Row, text: str, pair: str | None) -> dict[str, list[int]]:
        """One or two texts as a classifier takes them, cut to the length."""
        ids = row.ids("input_ids")
        if ids is not None:
            made: dict[str, list[int]] = {"input_ids": ids[: self.length]}
        else:
            texts = [row.text(text)] + ([row.text(pair)] if pair else [])
            found = self.tokenizer(*texts, truncation=True, max_length=self.length, verbose=False)
            made = {k: list(found[k]) for k in ("input_ids", "token_type_ids") if k in found}
        if not made["input_ids"]:
            raise Refused(f"{row.path}:{row.line}: an empty text gives no token")
        self.checked(made["input_ids"], row.path, row.line)
        return made | {"attention_mask": [1] * len(made["input_ids"])}

    def pad(self) -> int:
        """An id to pad with; attention never reaches it."""
        known = [self._config.pad_token_id]
        if self._tokenizer is not None:
            known += [self._tokenizer.pad_token_id, self._tokenizer.eos_token_id]
        known.append(self._config.eos_token_id if isinstance(getattr(self._config, "eos_token_id", None), int) else None)
        return next((i for i in known if i is not None and 0 <= i < self._rows), 0)


def _load(source: Source, auto: str, **config: Any) -> tuple[Any, set[str], list[str]]:
    """(model, parameters that its checkpoint lacks, stored tensors it has no use for)."""
    import torch
    import transformers

    if source.directory is None or source.config is None:
        raise Refused(f"{source.location}: has no config.json", hint="fine-tuning needs a transformers checkpoint")
    types = {t.dtype.torch for t in source.tensors.values() if t.dtype.is_float}
    if "quantization_config" in source.config or types - {"float64", "float32", "float16", "bfloat16"}:
        raise Refused(f"{source.location}: is quantised", hint="fine-tune the model that it was made from")
    wide = "float64" in types
    try:
        with quiet():
            model, report = getattr(transformers, auto).from_pretrained(
                source.directory, dtype=torch.float64 if wide else torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, trust_remote_code=False, **config,
            )  # fmt: skip
    except Exception as problem:
        first = (str(problem).splitlines() or [""])[0]
        raise Refused(f"{source.location}: cannot be loaded {auto[9:]}: {type(problem).__name__}: {first}") from None
    mismatched = {str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in report["mismatched_keys"]}
    new = (set(report["missing_keys"]) | mismatched) & {n for n, _ in model.named_parameters(remove_duplicate=False)}
    structure = structure_of({n: tuple(p.shape) for n, p in model.named_parameters()})
    inside = sorted(n for n in new if structure.block(n) is not None or structure.position(n) == 0.0)
    if inside:
        raise Refused(f"{source.location}: lacks `{inside[0]}` ({len(inside)} in all), which would be random")
    return model, new, sorted(report["unexpected_keys"])


class quiet:
    """transformers says nothing inside: what matters is said by us."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __exit__(self, *_: Any) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()

