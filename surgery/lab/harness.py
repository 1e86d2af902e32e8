"""Tasks of lm-evaluation-harness, run on live models: any task it ships, and task files of one's own, offline."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from surgery.errors import Refused, did_you_mean
from surgery.lab import measures
from surgery.lab.measure import Measure, mean_of
from surgery.lab.outcome import Array, Scored
from surgery.lab.scoring import check_causal
from surgery.lab.subject import Subject
from surgery.lab.tasks import Task

_MOST = 5000  # examples of which a measure of the whole (F1, BLEU) is resampled


class Harness(Task):
    """task: the harness's name of a task or group, or a task file (.yaml, relative to this one). shots: examples in the
    prompt; default the task's own. chat: wrap prompts in the model's chat template.

    validation, test: which of the task's examples, as `start:stop`; default all of them are `test`. limit: the first so many.
    A group's examples are taken together, each counting once.
    """

    KEYS: ClassVar[Mapping[str, Any]] = {"task": str, "shots": int, "chat": bool}
    OUTCOME: ClassVar[type] = Scored

    def validate(self) -> None:
        if not self.said.get("task"):
            raise self.refuse("needs `task`: a name that the harness knows, or a task file")
        if self.said.get("shots", 0) < 0:
            raise self.refuse("`shots` cannot be negative")
        for split in self.splits:
            self._range(split, 0)

    @property
    def splits(self) -> list[str]:
        return [*(["validation"] if "validation" in self.said else []), "test"]

    @property
    def measures(self) -> Mapping[str, Measure]:
        """As the task's file names them; where several filters read the answers, `measure/filter`."""
        made = {}
        for task in self._loaded().values():
            better = task.higher_is_better()
            for name in task.aggregation():
                for filter_ in self._filters(task):
                    key = _key(name, filter_)
                    made[key] = measures.scored(key, better.get(name))
        return made

    def measure(self, name: str) -> Measure:
        known = self.measures
        if name not in known:
            raise Refused(f"{self.what} cannot give `{name}`", hint=did_you_mean(name, known) or f"it gives {', '.join(known)}")
        return known[name]

    def run(self, subject: Subject, split: str) -> Scored:
        check_causal(self, subject)
        tasks = self._loaded()
        chosen = {name: self._chosen(task, split) for name, task in tasks.items()}
        self._check_tokenizer(subject, tasks)
        model = _language_model(subject, self.said.get("batch", 16), self)
        from lm_eval.evaluator import evaluate

        for task in tasks.values():
            shots = self.said.get("shots", task.get_config("num_fewshot"))
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=0)
        with _quiet(), self._problems(f"{subject.name}: the harness stopped"):
            found = evaluate(
                lm=model, task_dict={"tasks": tasks, "groups": {}, "group_map": {}}, samples=chosen, bootstrap_iters=0,
                apply_chat_template=self.said.get("chat", False),
            )  # fmt: skip
        for task in tasks.values():
            task._instances = None  # requests hold their answers: the next model must not find them
        return self._scored(found["samples"], tasks)

    # -- what the harness has ------------------------------------------------------------------------------------------------

    def _loaded(self) -> dict[str, Any]:
        return self.once("loaded", self._load)

    def _load(self) -> dict[str, Any]:
        need_harness()
        from lm_eval.tasks import TaskManager

        name = str(self.said["task"])
        path = self.beside(name)
        is_file = path.suffix.lower() in (".yaml", ".yml")
        with _quiet():
            manager = TaskManager(include_path=str(path.parent) if is_file else None, include_defaults=not is_file)
        if is_file:
            if not path.is_file():
                raise self.refuse(f"{path}: there is no such task file")
            given: Any = _spoken_name(path)
            if given is None:
                raise self.refuse(f"{path}: names no `task` or `group`")
            name = given
        if name not in manager.all_tasks:
            raise self.refuse(f"the harness has no task `{name}`", hint=did_you_mean(name, manager.all_tasks))
        with _quiet(), self._problems(f"task `{name}` cannot be loaded"), _inside(path.parent if is_file else None):
            made: dict[str, Any] = manager.load([name])["tasks"]
        return made

    def _check_tokenizer(self, subject: Subject, tasks: Mapping[str, Any]) -> None:
        """Refuse what the harness would stumble over."""
        end, start = subject.tokenizer.eos_token_id, subject.tokenizer.bos_token_id
        for name, task in tasks.items():
            if task.OUTPUT_TYPE == "generate_until" and end is None:
                raise self.refuse(f"{subject.name}: its tokenizer has no token that ends a text, as `{name}` needs")
            if task.OUTPUT_TYPE == "loglikelihood_rolling" and end is None and start is None:
                raise self.refuse(f"{subject.name}: its tokenizer has no token to begin a text with, as `{name}` needs")

    def _filters(self, task: Any) -> list[str]:
        return [f.name for f in getattr(task, "_filters", None) or []] or ["none"]

    def _range(self, split: str, count: int) -> range:
        said = self.said.get(split, ":")
        if isinstance(said, str) and said.count(":") == 1:
            ends = [e.strip() for e in said.split(":")]
            if all(e == "" or e.isdigit() for e in ends):
                first, last = (int(e) if e else None for e in ends)
                return range(count)[first:last]
        raise self.refuse(f"`{split}` is a range of the task's examples, like `0:100` or `100:`, got {said!r}")

    def _chosen(self, task: Any, split: str) -> list[int]:
        count = len(task.eval_docs)
        kept = list(self._range(split, count)[: self.said.get("limit")])
        if not kept:
            raise self.refuse(f"the {split} split is empty: `{task.task_name}` has {count} examples")
        return kept

    @contextlib.contextmanager
    def _problems(self, what: str) -> Iterator[None]:
        """What goes wrong inside of the harness, as one line."""
        try:
            yield
        except Refused:
            raise
        except Exception as problem:
            first = (str(problem).strip().splitlines() or [""])[0]
            offline = isinstance(problem, ConnectionError) or "offline" in str(problem).lower()
            hint = "its data set has to be on this machine already; a task file can name local files" if offline else None
            raise self.refuse(f"{what}: {type(problem).__name__}: {first}", hint=hint) from problem

    # -- what it found -------------------------------------------------------------------------------------------------------

    def _scored(self, samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Any]) -> Scored:
        items: dict[str, list[Any]] = {}
        how: dict[str, Callable[[Any], Any]] = {}
        for task_name, found in samples.items():
            aggregation = tasks[task_name].aggregation()
            for sample in found:
                for metric in sample["metrics"]:
                    key = _key(metric, sample["filter"])
                    items.setdefault(key, []).append(sample[metric])
                    how.setdefault(key, aggregation.get(metric) or (lambda values: float(np.mean(values))))
        most = max(map(len, items.values()))
        made = {k: _summands(v, how[k], k) for k, v in items.items() if len(v) == most}
        return Scored({k: f for k, (f, _) in made.items()}, {k: f for k, (_, f) in made.items()})


def _key(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric}/{filter_}"


def _summands(items: Sequence[Any], aggregate: Callable[[Any], Any], name: str) -> tuple[Array, Callable[[Array], Array]]:
    """Summands per example, and what makes the measure of their sums. Means are means; ratios of sums (perplexities, bits per
    byte) are those of pairs (log-likelihood, weight); anything else is computed anew by the harness for every resample."""
    kind = getattr(aggregate, "__name__", "")
    if kind in ("mean", "<lambda>") and all(isinstance(i, bool | int | float | np.number) for i in items):
        return np.stack([np.array(items, np.float64), np.ones(len(items))], axis=1), mean_of
    if kind in ("weighted_perplexity", "bits_per_byte") and all(isinstance(i, tuple | list) and len(i) == 2 for i in items):
        made = np.array([[-a, b] for a, b in items], np.float64)
        return made, (lambda s: np.exp(mean_of(s))) if kind == "weighted_perplexity" else (lambda s: mean_of(s) / math.log(2))
    if kind == "perplexity" and all(isinstance(i, int | float) for i in items):
        return np.stack([-np.array(items, np.float64), np.ones(len(items))], axis=1), lambda s: np.exp(mean_of(s))
    if len(items) > _MOST:
        raise Refused(
            f"`{name}` is computed over all {len(items)} examples at once: too many to resample", hint=f"limit: {_MOST}"
        )
    listed = list(items)

    def anew(counts: Array) -> Array:
        made = np.empty(len(counts))
        for i, row in enumerate(np.rint(counts).astype(int)):
            chosen = [x for x, n in zip(listed, row, strict=True) for _ in range(n)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of resamples that lack a class
                try:
                    made[i] = float(aggregate(chosen)) if chosen else math.nan
                except (ValueError, ZeroDivisionError):
                    made[i] = math.nan
        return made

    return np.eye(len(listed)), anew


def _spoken_name(path: Path) -> str | None:
    """What a task file calls its task or group."""
    import yaml

    class Lenient(yaml.SafeLoader):
        """Reads files with the harness's own tags (`!function`) as plain data."""

    Lenient.add_multi_constructor("!", lambda loader, tag, node: str(node.value))
    try:
        said = yaml.load(path.read_text("utf-8"), Lenient)  # a SafeLoader that keeps unknown tags as text
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as problem:
        raise Refused(f"{path}: cannot be read as a task file: {str(problem).splitlines()[0]}") from None
    found = said.get("task") if isinstance(said, dict) else None
    if isinstance(said, dict) and not isinstance(found, str):
        found = said.get("group")
    return found if isinstance(found, str) else None


def tasks_of(names: Sequence[str]) -> list[Task]:
    """One task for each name or file of the harness, called by it. Raises Refused."""
    from surgery.lab.tasks import make_task

    made = []
    for name in names:
        path = Path(name)
        called = path.stem if path.suffix.lower() in (".yaml", ".yml") else name
        made.append(make_task(called, {"kind": "lm-eval", "task": name}))
    return made


def need_harness() -> None:
    """Refuse now what would fail later."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise Refused(
            "tasks of kind lm-eval need lm-evaluation-harness", hint='pip install "weight-surgery[lm-eval]"'
        ) from None


def _language_model(subject: Subject, batch: int, task: Task) -> Any:
    """The live module, as the harness takes it."""
    from lm_eval.models.huggingface import HFLM

    module, tokenizer = subject.module, subject.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not hasattr(module, "generate") or not hasattr(module, "device"):
        from surgery.lab.generating import with_generation

        module = with_generation(module)
    with _quiet():
        return HFLM(
            pretrained=module, tokenizer=tokenizer, batch_size=batch, backend="causal", max_length=subject.positions,
            device=subject.device, prefix_token_id=tokenizer.pad_token_id if start is None else None,
        )  # fmt: skip


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Task files name their data relative to the working directory: it is theirs while they are read."""
    if folder is None:
        yield
        return
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and its data library log and draw bars; only what goes wrong is said, by us."""
    import datasets

    loggers = [logging.getLogger(n) for n in ("lm_eval", "lm-eval", "datasets", "evaluate")]
    levels = [lg.level for lg in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    for lg in loggers:
        lg.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    silent = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for lg, level in zip(loggers, levels, strict=True):
            lg.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if silent is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = silent
