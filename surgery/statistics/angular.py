"""How much runs of blocks turn the hidden state: what can be dropped (Gromov et al. 2024, arXiv 2403.17887, equation 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.source import Source, open_source
from surgery.checkpoint.structure import structure_of
from surgery.errors import Refused
from surgery.statistics.live import Live, load
from surgery.statistics.texts import tokenised


@dataclass(frozen=True)
class Angles:
    """distances[n][l]: mean over texts of arccos(cos(x_l, x_(l+n))) / pi at the last token, x_l the input of block l."""

    depth: int
    texts: int
    distances: dict[int, list[float]]

    def best(self, count: int) -> int:
        """The first of the `count` blocks that turn the hidden state least."""
        row = self.distances[count]
        return min(range(len(row)), key=lambda i: (row[i], i))


def angular_distances(
    model: str,
    data: str | Path,
    *,
    most: int | None = None,
    samples: int = 256,
    length: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Angles:
    """Measure runs of 1 to `most` blocks (default: all but one) of the model at `model` over texts. Raises Refused."""
    source = open_source(model)
    live = load(source)
    assert source.directory is not None
    texts = tokenised(Path(data), source.directory, samples=samples, length=length, vocabulary=live.vocabulary)
    return angles(live, source, texts, most=most, progress=progress)


def angles(
    live: Live,
    source: Source,
    texts: Sequence[Sequence[int]],
    *,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Angles:
    """As `angular_distances`, of a live model and texts as token ids."""
    import torch

    blocks = _blocks(live.model, source)
    depth = len(blocks)
    most = depth - 1 if most is None else most
    if not 1 <= most < depth:
        raise Refused(f"runs of 1 to {depth - 1} blocks can be measured, asked for {most}")
    states: list[Any] = [None] * (depth + 1)
    hooks = [block.register_forward_hook(_keep(states, i), with_kwargs=True) for i, block in enumerate(blocks)]
    sums = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    try:
        with torch.no_grad():
            for done, ids in enumerate(texts):
                live.run(ids)
                x = torch.nn.functional.normalize(torch.stack(states).double(), dim=1)
                sums += torch.arccos((x @ x.T).clamp(-1.0, 1.0)) / torch.pi
                progress(done + 1, len(texts))
    finally:
        for hook in hooks:
            hook.remove()
    mean = sums / len(texts)
    found = {n: [float(mean[i, i + n]) for i in range(depth - n + 1)] for n in range(1, most + 1)}
    return Angles(depth, len(texts), found)


def _keep(states: list[Any], i: int) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        states[i], states[i + 1] = before[0, -1], after[0, -1]

    return hook


def _blocks(model: Any, source: Any) -> list[Any]:
    """The live model's blocks, found by the names of the stored tower."""
    towers = structure_of({n: t.shape for n, t in source.tensors.items()}).towers
    if len(towers) != 1:
        raise Refused(f"{source.location}: has {len(towers)} towers of blocks; angular distances are taken of models with one")
    prefix, depth = towers[0].prefix, towers[0].depth
    for name, module in model.named_modules():
        same = name == prefix or name.endswith("." + prefix) or (name and prefix.endswith("." + name))
        if same and len(list(module.children())) == depth:
            return list(module.children())
    raise Refused(f"{source.location}: its blocks `{prefix}` are not found in the live {type(model).__name__}")
