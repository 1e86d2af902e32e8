"""A live transformers model around tensors that are in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import write_json
from surgery.errors import Refused


def load_state(name: str, config: Mapping[str, Any] | None, state: dict[str, Any], *, dtype: str | None) -> Any:
    """The model of the class that `config` names, holding `state`, in eval mode. dtype: None for that of the tensors.

    Raises Refused where transformers does not know the class and where tensors do not fit: nothing is initialised at random.
    Remote code is never run.
    """
    import torch
    import transformers

    names = (config or {}).get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if config is None or kind is None or not hasattr(kind, "from_pretrained"):
        what = "has no config.json" if config is None else f"is a {names[0] if names else 'model of unnamed class'}"
        raise Refused(f"{name}: {what}; transformers cannot build it", hint="--module FILE.py:FUNCTION builds any module")
    floats = [t.dtype for t in state.values() if t.is_floating_point()]
    chosen = getattr(torch, dtype) if dtype is not None else max(set(floats), key=floats.count) if floats else None
    shown = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is amiss is said below
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", dict(config))
            known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = kind.from_pretrained(None, config=known, state_dict=state, output_loading_info=True, dtype=chosen)
    except (ValueError, RuntimeError, KeyError, OSError) as problem:
        raise Refused(f"{name}: transformers cannot build {names[0]}: {(str(problem).splitlines() or [''])[0]}") from None
    finally:
        transformers.logging.set_verbosity(shown)
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise Refused(f"{name}: lacks `{missing[0]}` ({len(missing)} in all), which {names[0]} needs: it would be random")
    if extra:
        raise Refused(f"{name}: has `{extra[0]}` ({len(extra)} in all), which {names[0]} does not know")
    if report["mismatched_keys"]:
        raise Refused(f"{name}: {sorted(map(str, report['mismatched_keys']))[0]} has another shape than {names[0]} wants")
    return model.eval()
