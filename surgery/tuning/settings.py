"""A tune file read: types and limits checked, defaults filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.tuning.schema import (
    AVERAGES,
    DISTIL,
    FAST_FORWARD,
    METHODS,
    OUTPUTS,
    REGULARISE,
    SETTINGS,
    TASKS,
    THROUGH,
    Schema,
)

Place = Callable[..., str]
_BLOCKS = ("method", "average", "regularise", "fast_forward", "through", "distil")


@dataclass(frozen=True)
class Settings:
    """How to train. method and average: name; the options beside them are complete."""

    method: str
    options: Any
    average: str | None
    average_options: dict[str, Any]
    regularise: dict[str, Any]
    fast_forward: dict[str, Any] | None
    through: dict[str, Any] | None
    distil: dict[str, Any] | None
    layer_decay: float | None
    epochs: float
    steps: int | None
    lr: float
    batch: int
    accumulate: int
    schedule: str
    warmup: float
    weight_decay: float
    optimizer: str
    seed: int
    precision: str
    device: str
    save_every: int | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A whole tune file: on what model, for what task, written as what."""

    model: str
    task: dict[str, Any]
    settings: Settings
    output: str


def read_job(data: Any, place: Place) -> Job:
    """Check a tune file's data. place: path of keys -> `file:line:col`. Raises Refused."""
    if not isinstance(data, Mapping):
        raise Refused(f"{place()}: not a tune file (expected model, task and method)")
    known = ["model", "task", "output", *_BLOCKS, *SETTINGS]
    _unknown(data, known, place, (), "the tune file")
    for key in ("model", "task"):
        if key not in data:
            raise Refused(f"{place()}: the tune file needs `{key}`")
    _check({"type": "string", "minLength": 1}, data["model"], place, ("model",))
    task = data["task"]
    kind = task.get("kind") if isinstance(task, Mapping) else None
    if kind not in TASKS:
        hint = did_you_mean(str(kind), TASKS) if kind else "known: " + ", ".join(TASKS)
        raise Refused(f"{place('task', 'kind')}: task needs a `kind`" + (f", not `{kind}`" if kind else ""), hint=hint)
    task = _complete(TASKS[kind], task, place, ("task",))
    output = data.get("output")
    if output is None:
        through = data.get("through")
        merged = isinstance(through, Mapping) and through.get("of", "weights") != "adapter"
        output = "adapter" if _named(data.get("method", "full")) == "lora" and not merged else "checkpoint"
    _check({"enum": list(OUTPUTS)}, output, place, ("output",))
    rest = {k: v for k, v in data.items() if k not in ("model", "task", "output")}
    settings = read_settings(rest, place)
    if output == "adapter" and settings.through and settings.through["of"] != "adapter":
        raise Refused(f"{place('output')}: with `through: of: {settings.through['of']}` the adapter and its base are one",
                      hint="output: checkpoint, or delta")  # fmt: skip
    if output == "adapter" and settings.method != "lora":
        raise Refused(f"{place('output')}: only `method: lora` makes an adapter", hint="output: delta is small as well")
    return Job(data["model"], task, settings, output)


def read_settings(data: Mapping[str, Any], place: Place) -> Settings:
    """The part of a tune file that says how to train. Raises Refused."""
    _unknown(data, [*_BLOCKS, *SETTINGS], place, (), "the settings")
    values: dict[str, Any] = {}
    for key, schema in SETTINGS.items():
        given = data.get(key)
        if given is not None:
            _check(schema, given, place, (key,))
        values[key] = schema.get("default") if given is None else given
    method, options = _choice("method", data.get("method", "full"), METHODS, place)
    average, average_options = None, dict[str, Any]()
    if data.get("average") is not None:
        average, average_options = _choice("average", data["average"], AVERAGES, place)
    regularise = _complete(REGULARISE, data.get("regularise") or {}, place, ("regularise",))
    forward = data.get("fast_forward")
    if forward is not None:
        forward = _complete(FAST_FORWARD, forward, place, ("fast_forward",))
    through, distil = data.get("through"), data.get("distil") or None
    if through is not None:
        through = _through(_complete(THROUGH, through, place, ("through",)), place)
    if distil is not None:
        distil = _complete(DISTIL, {} if distil is True else distil, place, ("distil",))
    made = Settings(method=method, options=options, average=average, average_options=average_options, regularise=regularise,
                    fast_forward=forward, through=through, distil=distil, **values)  # fmt: skip
    _together(made, data, place)
    return made


def _through(given: dict[str, Any], place: Place) -> dict[str, Any]:
    """With the codec's own options complete. Raises Refused for what the codec does not take."""
    from surgery.delta import lossy  # noqa: F401  registers the codecs
    from surgery.delta.codecs.base import check_options, lossy_codec

    codec = lossy_codec(given["codec"])
    own = {k: v for k, v in given.items() if k in ("bits", "group", "scale", "signs", "criterion")}
    usual = {"scale": "l2", "signs": False}  # as published
    own = {**{k: v for k, v in usual.items() if k in codec.options}, **own}
    try:
        own = check_options(codec, own)
    except Refused as problem:
        raise Refused(f"{place('through')}: {problem.message}", hint=problem.hint) from None
    uniform = given["codec"] == "hadamard"
    if given.get("trust") and (not uniform or given["learned"]):
        why = "learned steps have a mask of their own" if uniform else f"trust belongs to hadamard, not to {given['codec']}"
        raise Refused(f"{place('through', 'trust')}: {why}", hint="leave it out")
    if given["learned"] and given["of"] != "weights":
        raise Refused(f"{place('through', 'learned')}: steps are learned from those of weights; of: {given['of']} has none "
                      "to begin with", hint="of: weights")  # fmt: skip
    if "step_lr" in given and not given["learned"]:
        raise Refused(f"{place('through', 'step_lr')}: no step is learned", hint="learned: true")
    return {**given, **own, "trust": given.get("trust", uniform and not given["learned"])}


def _together(s: Settings, data: Mapping[str, Any], place: Place) -> None:
    """Settings that exclude each other."""
    if s.method == "lora":
        if s.through is not None and s.through["of"] == "adapter" and _start(s) in ("pissa", "olora", "corda"):
            raise Refused(f"{place('through', 'of')}: an adapter taken out of the base is written with its start beside it, "
                          "which is not rounded", hint="init_lora_weights: true, or eva; or of: weights")  # fmt: skip
        start = _start(s)
        for key in ("calibration", "calibration_examples"):
            if key in s.options and start not in ("corda", "eva"):
                raise Refused(f"{place('method', 'lora', key)}: only adapters that start from data look at any",
                              hint="init_lora_weights: corda, or eva")  # fmt: skip
        for key in ("l2_sp", "mixout"):
            if s.regularise.get(key):
                raise Refused(f"{place('regularise', key)}: {key} pulls weights towards the base; with lora they stay there",
                              hint="use weight_decay, which pulls the adapter towards zero")  # fmt: skip
        if s.layer_decay is not None:
            raise Refused(f"{place('layer_decay')}: has no meaning for an adapter", hint="leave it out")
    if s.through is not None:
        of = s.through["of"]
        if of in ("adapter", "base") and s.method != "lora":
            raise Refused(f"{place('through', 'of')}: {of} goes with `method: lora`, not with {s.method}",
                          hint="of: weights, or delta")  # fmt: skip
        if of != "weights" and s.method == "columns":
            raise Refused(f"{place('through', 'of')}: of what `method: columns` leaves alone nothing but the weights can be "
                          "rounded", hint="of: weights")  # fmt: skip
        if s.regularise.get("mixout"):
            raise Refused(f"{place('regularise', 'mixout')}: mixout and through would both rewrite the weights")
        if s.average == "stock" and s.through["learned"]:
            raise Refused(f"{place('average')}: stock merges weights, not the steps of a grid", hint="learned: false")
    if s.average == "stock":
        if s.method in ("lora", "lift", "lt_sft", "diff_pruning"):
            raise Refused(f"{place('average')}: stock merges whole models, which `method: {s.method}` does not train")
        if s.steps is not None:
            raise Refused(f"{place('steps')}: stock merges after every epoch", hint="give epochs")
        if s.epochs != int(s.epochs):
            raise Refused(f"{place('epochs')}: stock needs whole epochs, got {s.epochs}")
    if s.method == "diff_pruning" and s.regularise.get("mixout"):
        raise Refused(f"{place('regularise', 'mixout')}: mixout and the gates of diff_pruning would both rewrite the weights")
    if s.method == "spt" and s.options.get("structured"):
        if s.average == "stock":
            raise Refused(f"{place('average')}: stock merges whole models, which spt's low-rank changes are not")
        if s.fast_forward is not None:
            raise Refused(f"{place('fast_forward')}: repeats updates of weights; spt's low-rank changes are products")
    if s.fast_forward is not None and s.average == "stock":
        raise Refused(f"{place('fast_forward')}: stock's runs must take the same steps")
    if s.average == "elastic" and s.method == "lift":
        raise Refused(f"{place('average')}: elastic goes back to where masked entries were; lift moves its mask")
    if s.method == "lift" and "budget" in s.options and "density" in (_options(data.get("method")) or {}):
        raise Refused(f"{place('method', 'lift')}: give density or budget, not both")


def _start(s: Settings) -> str:
    """How an adapter starts: the word of peft's `init_lora_weights`."""
    return str(s.options.get("init_lora_weights", "")).lower().partition("_niter_")[0]


def _named(value: Any) -> str:
    return next(iter(value), "") if isinstance(value, Mapping) else str(value)


def _options(value: Any) -> Any:
    return next(iter(value.values()), None) if isinstance(value, Mapping) else None


def _choice(key: str, value: Any, table: Mapping[str, Schema], place: Place) -> tuple[str, Any]:
    """`name`, or `{name: options}`."""
    if not isinstance(value, str | Mapping) or (isinstance(value, Mapping) and len(value) != 1):
        raise Refused(f"{place(key)}: {key} is a name, or one name with its options", hint="known: " + ", ".join(table))
    name, options = _named(value), _options(value)
    if name not in table:
        raise Refused(f"{place(key, name)}: there is no {key} `{name}`", hint=did_you_mean(name, table))
    schema = table[name]
    if schema.get("type") == "object":
        return name, _complete(schema, {} if options is None else options, place, (key, name))
    if schema.get("type") == "integer" and options is None:
        raise Refused(f"{place(key)}: {name} needs a number", hint=f"{key}: {{{name}: 2}}")
    if "const" in schema and options is not None:
        raise Refused(f"{place(key, name)}: {name} has no options")
    if options is not None:
        _check(schema, options, place, (key, name))
    return name, options


def _complete(schema: Schema, value: Any, place: Place, path: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(value, Mapping) and schema.get("additionalProperties") is False:
        _unknown(value, list(schema["properties"]), place, path, ".".join(path))
        value = {k: v for k, v in value.items() if v is not None}
        inner = {k: s for k, s in schema["properties"].items() if "properties" in s and k in value}
        value |= {k: _complete(s, value[k], place, (*path, k)) for k, s in inner.items()}
    _check(schema, value, place, path)
    defaults = {k: s["default"] for k, s in schema.get("properties", {}).items() if "default" in s}
    return defaults | dict(value)


def _unknown(value: Mapping[str, Any], known: Iterable[str], place: Place, path: tuple[str, ...], what: str) -> None:
    for key in value:
        if key not in known:
            raise Refused(f"{place(*path, key)}: unknown key `{key}` in {what}", hint=did_you_mean(str(key), known))


def _check(schema: Schema, value: Any, place: Place, path: tuple[str, ...]) -> None:
    import jsonschema

    problems = sorted(jsonschema.Draft202012Validator(schema).iter_errors(value), key=lambda e: list(map(str, e.absolute_path)))
    if not problems:
        return
    problem = problems[0]
    at = (*path, *problem.absolute_path)
    if problem.validator == "required":
        lacking = next(k for k in problem.validator_value if k not in problem.instance)
        raise Refused(f"{place(*at)}: {'.'.join(map(str, at))} needs `{lacking}`")
    if problem.validator == "enum":
        raise Refused(f"{place(*at)}: {'.'.join(map(str, at))} cannot be `{problem.instance}`",
                      hint=did_you_mean(str(problem.instance), map(str, problem.validator_value)))  # fmt: skip
    if problem.validator == "anyOf":
        about = problem.schema.get("description", "").rstrip(".")
        raise Refused(f"{place(*at)}: {'.'.join(map(str, at))} cannot be {problem.instance!r}", hint=about or None)
    raise Refused(f"{place(*at)}: {'.'.join(map(str, at))}: {problem.message}")
