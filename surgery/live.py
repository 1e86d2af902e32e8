"""From a lazy checkpoint to a live transformers model, without writing it to disk."""

from __future__ import annotations

import tempfile
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
    import transformers

    from surgery.engine.compute import compute_all

    if checkpoint.space == "delta":
        raise Refused("a delta is no model", hint="add it to its base first: base + delta")
    config = checkpoint.plan().config
    names = (config or {}).get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if config is None or kind is None:
        what = "has no config.json" if config is None else f"is a {names[0] if names else 'model of unnamed class'}"
        raise Refused(f"{checkpoint!r} {what}, which transformers cannot build", hint="save() it and load it where it belongs")
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        loaded_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options.setdefault("dtype", "auto")
    state = compute_all(dict(checkpoint.node.tensors))
    if options["dtype"] == "auto":
        floats = [t.dtype for t in state.values() if t.is_floating_point()]
        options["dtype"] = max(set(floats), key=floats.count) if floats else None
    model, report = kind.from_pretrained(
        None, config=loaded_config, state_dict=state, output_loading_info=True, **options
    )
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or extra:
        what = f"lacks `{missing[0]}`" if missing else f"has `{extra[0]}`, which the model does not know"
        raise Refused(f"{names[0]}: the checkpoint {what} ({len(missing)} missing, {len(extra)} unexpected)")
    return model.eval()
