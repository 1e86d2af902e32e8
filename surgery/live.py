"""From tensors to a live transformers model, without writing them to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.sidecar import write_json
from surgery.errors import Refused

if TYPE_CHECKING:
    from surgery.api import Checkpoint


def to_transformers(checkpoint: Checkpoint, **options: Any) -> Any:
    """A transformers model of the class its config names, with the tensors computed into memory.

    options go to `from_pretrained`. Raises Refused for deltas, for checkpoints without config, for architectures that
    transformers does not know, and when tensors do not fit the model: nothing is initialised at random.
    """
    from surgery.engine.compute import compute_all

    if checkpoint.space == "delta":
        raise Refused("a delta is no model", hint="add it to its base first: base + delta")
    config = checkpoint.plan().config
    name, hint = repr(checkpoint), "save() it and load it where it belongs"
    known_class(name, config, hint=hint)  # before anything is computed
    return load_state(name, config, compute_all(dict(checkpoint.node.tensors)), hint=hint, **options)


def known_class(name: str, config: Mapping[str, Any] | None, *, hint: str) -> Any:
    """The transformers class that `config` names. Raises Refused."""
    import transformers

    names = (config or {}).get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if config is None or kind is None or not hasattr(kind, "from_pretrained"):
        what = "has no config.json" if config is None else f"is a {names[0] if names else 'model of unnamed class'}"
        raise Refused(f"{name} {what}, which transformers cannot build", hint=hint)
    return kind


def load_state(
    name: str,
    config: Mapping[str, Any] | None,
    state: dict[str, Any],
    *,
    hint: str,
    dtype: Any = "auto",
    **options: Any,
) -> Any:
    """The model of the class that `config` names, holding `state`, in eval mode.

    dtype: as transformers takes it; "auto" or None is the one that most tensors have. options go to `from_pretrained`. Raises
    Refused where transformers does not know the class and where tensors do not fit: nothing is initialised at random. Remote
    code is never run.
    """
    import transformers

    kind = known_class(name, config, hint=hint)
    if dtype in ("auto", None):
        floats = [t.dtype for t in state.values() if t.is_floating_point()]
        dtype = max(set(floats), key=floats.count) if floats else None
    shown = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is amiss is said below
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", dict(config or {}))
            known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = kind.from_pretrained(
            None, config=known, state_dict=state, output_loading_info=True, dtype=dtype, **options
        )
    except (ValueError, RuntimeError, KeyError, OSError) as problem:
        first = (str(problem).splitlines() or [""])[0]
        raise Refused(f"{name}: transformers cannot build {kind.__name__}: {first}") from None
    finally:
        transformers.logging.set_verbosity(shown)
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise Refused(f"{name}: lacks `{missing[0]}` ({len(missing)} in all), which {kind.__name__} needs: it would be random")
    if extra:
        raise Refused(f"{name}: has `{extra[0]}` ({len(extra)} in all), which {kind.__name__} does not know")
    if report["mismatched_keys"]:
        wrong = sorted(map(str, report["mismatched_keys"]))[0]
        raise Refused(f"{name}: {wrong} has another shape than {kind.__name__} wants")
    return model.eval()
