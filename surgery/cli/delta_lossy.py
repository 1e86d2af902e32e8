"""What `surgery delta pack` was told about losses: codec, budget, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.delta.calibration.session import Witness
    from surgery.delta.codecs.exact import Exact
    from surgery.delta.pack import Choose
    from surgery.graph.node import Node


@contextmanager
def chosen(
    base: Node, model: Node, how: Mapping[str, Any], data: Mapping[str, Any], quiet: bool, plain: Exact
) -> Iterator[tuple[Choose | None, Witness | None]]:
    """(what is coded how, what looks on while it is written). data: calib, probe, repair, samples, length. plain: the codec of
    what is carried exactly."""
    from surgery.errors import Refused

    calib, probe, memory, smallest = data["calib"], data["probe"], how["memory"], how["smallest"]
    how = {k: v for k, v in how.items() if k not in ("memory", "smallest")}
    if smallest:
        if any(how.values()) or calib is not None or probe is not None:
            raise Refused("--smallest is exact: it goes with no codec, budget, --set, --only or data")
        yield _smallest(model, memory), None
        return
    if calib is None and probe is None:
        if data["repair"]:
            raise Refused("--repair is trained on texts", hint="name them with --calib")
        yield _choose(base, model, plain, **how), None
        return
    lossy = any(how[k] is not None for k in ("codec", "bits", "size", "max_error"))
    if how["exact"] or not lossy:
        raise Refused("--calib and --probe are for lossy packages", hint="give --bits, --size or a --codec")
    from transformers.utils import logging

    from surgery.cli.progress import steps
    from surgery.delta.calibration.session import calibration, witness

    logging.disable_progress_bar()
    given = {k: data[k] for k in ("samples", "length")}
    with calibration(base, model, calib, repair=data["repair"] or 0, step=steps(show=not quiet), **given) as session:
        fitted = None
        choose = _choose(base, model, plain, weights=session.weights if calib else None, **how)
        if calib is not None:
            assert choose is not None
            fitted = session.fit(choose)
            choose = fitted.choose
        yield choose, witness(session, fitted, probe, **given)


def _smallest(model: Node, memory: str | None) -> Choose:
    from surgery.checkpoint.layout import parse_size
    from surgery.delta import choices
    from surgery.delta.pack import available

    return choices.low_rank(model, available() if memory is None else parse_size(memory))


def _choose(
    base: Node,
    model: Node,
    plain: Exact,
    *,
    exact: bool,
    codec: str | None,
    bits: float | None,
    size: str | None,
    max_error: float | None,
    options: tuple[str, ...],
    only: tuple[str, ...],
    weights: Callable[[set[str]], Mapping[str, float]] | None = None,
) -> Choose | None:
    """What the options say of every tensor; None: an exact package. weights: of tensors by name, where data is given."""
    from surgery.delta import choices
    from surgery.errors import Refused

    budgets = {"bits": bits, "size": size, "max_error": max_error}
    given = [k for k, v in budgets.items() if v is not None]
    if exact or not (given or codec):
        if given or codec or options or only:
            raise Refused("--exact goes with no codec, budget, --set or --only: every bit comes back")
        return None
    if len(given) > 1:
        raise Refused(f"give one of --{' and --'.join(given).replace('_', '-')}: a budget is one of them")
    parsed = dict(_option(text) for text in options)
    if codec == "auto" or (codec is None and size is not None):
        from surgery.checkpoint.layout import parse_size

        if parsed:
            raise Refused("--set goes with a --codec by name")
        amount = None if size is None else parse_size(size)
        return choices.automatic(
            base, model, bits=bits, size=amount, max_error=max_error, only=only, weights=weights, exact=plain
        )
    if size is not None:
        raise Refused("--size is shared out by `--codec auto`", hint="leave --codec out, or give --bits")
    budget = {k: budgets[k] for k in given}
    return choices.fixed(model, codec or choices.DEFAULT, {**budget, **parsed}, only)


def budget(
    codec: str | None, bits: float | None, max_error: float | None, options: tuple[str, ...], default: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """One codec and its options for everything; `dither` and `default` where nothing is said. Raises Refused."""
    from surgery.delta import choices
    from surgery.delta.codecs.base import check_options, lossy_codec
    from surgery.errors import Refused

    if bits is not None and max_error is not None:
        raise Refused("give one of --bits and --max-error: a budget is one of them")
    given = {k: v for k, v in (("bits", bits), ("max_error", max_error)) if v is not None}
    given |= dict(_option(text) for text in options)
    found = lossy_codec(codec or choices.DEFAULT)
    return found, check_options(found, given or ({} if codec else dict(default)))


def _option(text: str) -> tuple[str, Any]:
    import yaml

    from surgery.errors import Refused

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise Refused(f"--set {text}: expected KEY=VALUE")
    return key, yaml.safe_load(value)


def codecs() -> Iterator[str]:
    from surgery.delta import lossy  # noqa: F401
    from surgery.delta.codecs.base import LOSSY

    for name, codec in LOSSY.items():
        yield name
        for key, schema in codec.options.items():
            default = schema.get("default")
            yield f"  {key:<12} {schema.get('description', '')}" + (f" (default {default})" if default is not None else "")
