"""Learning how a mixture's experts are mixed into one dense layer (XFT, Ding et al. 2024, arXiv 2404.15247, section 3.3).

    W = shared_weight * W_shared + (1 - shared_weight) * sum_i softmax(a)_i W_i

with one vector a for each block, zero at first (equal shares); everything else stays as it is in the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import write_json
from surgery.engine.compute import compute_all
from surgery.errors import Refused
from surgery.graph.node import Node, sources_of
from surgery.live import load_state
from surgery.reshape.layouts import PARTS
from surgery.reshape.mixing import MODEL, SUFFIX
from surgery.reshape.upcycle import DowncycleNode
from surgery.statistics.texts import tokenised


@dataclass(frozen=True)
class Learned:
    """shares: block -> share of each routed expert, of the step with the lowest held-out loss (`best`, 0: the equal shares).
    losses: step -> mean negative log-likelihood per token of held-out texts, in nats."""

    shares: dict[str, list[float]]
    losses: dict[int, float]
    best: int


def learn_mixing(
    mixture: Node,
    data: str | Path,
    *,
    shared_weight: float = 0.75,
    steps: int = 100,
    rate: float = 0.05,
    batch: int = 8,
    samples: int = 1024,
    length: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Learned:
    """Learn the shares of a causal language model's experts on the texts in `data`; every tenth text is held out.

    All weights are held in memory in float32. Adam; a batch of texts a step, drawn by `seed`. Raises Refused for models that
    `downcycle` does not know, and for fewer than ten texts.
    """
    import torch

    dense = DowncycleNode(mixture, None, {}, shared_weight=shared_weight, weights=None)
    parts = _parts(dense)
    blocks = list(dict.fromkeys(map(_block, parts)))
    model = load_state(
        "the dense model", dense.config, compute_all(dict(dense.tensors)), hint="downcycle needs one", dtype=torch.float32
    )
    directory = sources_of(mixture)[0].source.directory
    assert directory is not None
    words = model.get_input_embeddings().num_embeddings
    texts = [t for t in tokenised(Path(data), directory, samples=samples, length=length, vocabulary=words) if len(t) > 1]
    if len(texts) < 10:
        raise Refused(f"{data}: {len(texts)} texts of two tokens or more; ten are the least to learn from and to look at")
    live = _live_names(model, list(parts))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    a = {b: torch.zeros(dense.experts, requires_grad=True) for b in blocks}
    optimiser = torch.optim.Adam(list(a.values()), lr=rate)
    held, seen = texts[9::10], [t for i, t in enumerate(texts) if i % 10 != 9]
    generator = torch.Generator().manual_seed(seed)

    def loss_of(chosen: Sequence[list[int]]) -> Any:
        mixed = {}
        for name, (always, stack) in parts.items():
            value = torch.tensordot(a[_block(name)].softmax(0), stack, 1)
            mixed[live[name]] = value if always is None else value + always
        total, count = torch.zeros(()), 0
        for ids in chosen:
            given = torch.tensor([ids])
            logits = torch.func.functional_call(model, mixed, args=(), kwargs={"input_ids": given, "use_cache": False}).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1].float(), given[0, 1:], reduction="sum")
            count += len(ids) - 1
        return total / count

    losses: dict[int, float] = {}
    best, kept = 0, {b: x.detach().clone() for b, x in a.items()}
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.no_grad():
                losses[step] = float(loss_of(held))
            if losses[step] < losses[best]:
                best, kept = step, {b: x.detach().clone() for b, x in a.items()}
        progress(step, steps)
        if step < steps:
            picks = torch.randint(len(seen), (batch,), generator=generator).tolist()
            optimiser.zero_grad()
            loss_of([seen[i] for i in picks]).backward()
            optimiser.step()
    shares = {b: [float(v) for v in x.double().softmax(0)] for b, x in kept.items()}
    return Learned(shares, losses, best)


def write_mixing(found: Learned, mixture: Node, out: str | Path, **settings: Any) -> None:
    """Write shares for `downcycle: {weights: OUT}`. Raises Refused where something is there already."""
    import torch
    from safetensors.torch import save_file

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise Refused(f"{out}: already holds something", hint="name another directory")
    out.mkdir(parents=True, exist_ok=True)
    save_file({b + SUFFIX: torch.tensor(s, dtype=torch.float32) for b, s in found.shares.items()}, out / "model.safetensors")
    source = sources_of(mixture)[0].source
    losses = {str(step): loss for step, loss in found.losses.items()}
    write_json(
        out / MODEL,
        {"model": source.location, "fingerprint": source.fingerprint, **settings, "losses": losses, "best": found.best},
    )


def _block(name: str) -> str:
    return name.rpartition(".mlp.")[0]


def _parts(dense: DowncycleNode) -> dict[str, tuple[Any, Any]]:
    """Dense matrix -> the shared expert's part of it (None: there is none), and the routed ones' (experts, out, in)."""
    import torch

    ends = tuple(f".mlp.{p}.weight" for p in PARTS)
    made = {}
    for name in (n for n in dense.tensors if n.endswith(ends)):
        always, others = dense.experts_of(name)
        values = compute_all({str(i): e for i, e in enumerate([*others, *([] if always is None else [always])])})
        stack = [values[str(i)].float() for i in range(len(values))]
        first = None if always is None else stack.pop() * dense.share_of_shared
        made[name] = first, torch.stack(stack) * (1.0 if always is None else 1.0 - dense.share_of_shared)
    return made


def _live_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Stored name -> the live model's, which may have more or less in front."""
    known = [n for n, _ in model.named_parameters()]
    found = {}
    for name in names:
        near = [k for k in known if k == name or k.endswith("." + name) or name.endswith("." + k)]
        if len(near) != 1:
            raise Refused(f"`{name}` is not found in the live {type(model).__name__}")
        found[name] = near[0]
    return found
