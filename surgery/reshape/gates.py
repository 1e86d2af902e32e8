"""Routers from prompts: an expert's row is the mean hidden state of texts that it should be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import small_text
from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import open_source
from surgery.errors import Refused
from surgery.reshape.layouts import for_dense
from surgery.statistics.live import load


def read_prompts(path: Path) -> list[dict[str, list[str]]]:
    """One entry per expert: `{positive: [...], negative: [...]}`, from a YAML list. Raises Refused."""
    import yaml

    try:
        said = yaml.safe_load(small_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as problem:
        raise Refused(f"{path}: cannot be read as YAML: {str(problem).splitlines()[0]}") from None
    ok = isinstance(said, list) and len(said) > 1 and all(_is_entry(e) for e in said)
    if not ok:
        raise Refused(f"{path}: expected a list with `positive: [texts]` (and `negative:`) for each of two or more experts")
    return [{"positive": list(e["positive"]), "negative": list(e.get("negative") or [])} for e in said]


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or entry.keys() - {"positive", "negative"}:
        return False
    lists = [entry.get("positive"), entry.get("negative") or ["-"]]
    return all(isinstance(x, list) and x and all(isinstance(t, str) and t for t in x) for x in lists)


def gates_from_prompts(model: str, prompts: Sequence[Mapping[str, Sequence[str]]], out: str | Path) -> int:
    """Write a checkpoint of router weights for `upcycle: {gates: OUT}`; returns how many.

    Row e of block l is the mean, over tokens and texts, of the input of block l's feed-forward layer for expert e's positive
    texts, less that of its negative ones, scaled to length one. Raises Refused.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    source = open_source(model)
    layout = for_dense(str((source.config or {}).get("model_type")))
    if layout is None or source.directory is None:
        raise Refused(f"{model}: not a dense model that `upcycle` knows")
    live = load(source)
    feed = {name: m for name, m in live.model.named_modules() if name.endswith(".mlp")}
    tokenizer: Any = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False)
    states: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            states[name] = args[0][0].double().mean(dim=0)

        return hook

    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in feed.items()]

    def mean(texts: Sequence[str], name_sums: dict[str, Any]) -> None:
        for text in texts:
            live.run(list(tokenizer(text)["input_ids"]))
            for name, state in states.items():
                name_sums[name] = name_sums.get(name, 0.0) + state / len(texts)

    rows: dict[str, list[Any]] = {name: [] for name in feed}
    try:
        with torch.no_grad():
            for entry in prompts:
                good: dict[str, Any] = {}
                bad: dict[str, Any] = {}
                mean(entry["positive"], good)
                mean(entry["negative"], bad)
                for name in feed:
                    rows[name].append(torch.nn.functional.normalize(good[name] - bad.get(name, 0.0), dim=0))
    finally:
        for hook in hooks:
            hook.remove()
    made = {
        layout.router.format(block=_stored(name, source)): torch.stack(r).float().contiguous() for name, r in rows.items()
    }
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise Refused(f"{out}: already holds something", hint="name another directory")
    out.mkdir(parents=True, exist_ok=True)
    save_file(made, out / "model.safetensors")
    write_json(out / "gates.json", {"model": model, "prompts": [dict(p) for p in prompts]})
    return len(made)


def _stored(name: str, source: Any) -> str:
    """The stored name of the block that the live module `….mlp` belongs to."""
    block = name.removesuffix(".mlp")
    for tensor in source.tensors:
        if tensor.endswith(".mlp.up_proj.weight"):
            found = str(tensor).removesuffix(".mlp.up_proj.weight")
            if found == block or block.endswith("." + found) or found.endswith("." + block):
                return found
    raise Refused(f"{source.location}: `{block}` of the live model has no stored feed-forward layer")
