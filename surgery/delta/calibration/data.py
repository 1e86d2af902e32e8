"""What `--calib` and `--probe` name: texts, or a statistics checkpoint with Gram matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.source import Source
from surgery.errors import Refused
from surgery.graph.node import Node, SourceNode
from surgery.statistics.live import Live, load
from surgery.statistics.node import StatisticsNode, statistics_checkpoint
from surgery.statistics.texts import file_digest, tokenised

PROBES = 64  # texts of a file that outputs are compared on


@dataclass(frozen=True)
class Texts:
    """fit: token ids to calibrate on; probe: those kept back to compare outputs on, the same ones where there is only one."""

    file: str
    sha256: str
    fit: Sequence[list[int]]
    probe: Sequence[list[int]]
    held_out: bool

    def facts(self, texts: Sequence[list[int]]) -> dict[str, Any]:
        return {"file": self.file, "sha256": self.sha256, "texts": len(texts), "tokens": sum(map(len, texts))}


@dataclass
class Tuned:
    """The fine-tuned model, alive in float32, its weights by the names that they are stored under."""

    source: Source
    live: Live
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def hold(self, name: str, values: Any) -> None:
        """Put other values (numpy, float32) into a parameter."""
        import torch

        self.parameters[name].data.copy_(torch.from_numpy(values))


def tuned_model(model: Node) -> Tuned:
    """Load the model. Raises Refused for what is not a checkpoint that transformers loads."""
    if not isinstance(model, SourceNode):
        raise Refused(f"{model.label or model.text}: is computed", hint="calibration runs a saved model: save it first")
    live = load(model.source)
    return Tuned(model.source, live, {live.names[id(p)]: p for p in live.model.parameters() if id(p) in live.names})


def read_texts(location: str, tuned: Tuned, *, samples: int, length: int) -> Texts:
    """Up to `samples` texts to fit on and a fifth as many, 64 at most, kept back. Raises Refused."""
    if samples < 1 or length < 1:
        raise Refused("samples and length must be at least 1")
    path, source, live = Path(location).expanduser(), tuned.source, tuned.live
    assert source.directory is not None
    length = min(length, live.longest) if live.longest else length
    most = samples + min(PROBES, max(1, samples // 5))
    found = tokenised(path, source.directory, samples=most, length=length, vocabulary=live.vocabulary)
    held = min(PROBES, max(1, len(found) // 6)) if len(found) > 1 else 0
    return Texts(path.name, file_digest(path), found[: len(found) - held], found[len(found) - held :] or found, held > 0)


def statistics_of(location: str, model: Node) -> StatisticsNode | None:
    """Gram matrices collected before; None if `location` is a file. Raises Refused for those of another model."""
    path = Path(location).expanduser()
    if path.is_file():
        return None
    if not path.exists():
        raise Refused(f"{location}: no such file", hint="texts (.txt, .jsonl), or what `surgery statistics` wrote")
    node = statistics_checkpoint(location, None, {})
    if not isinstance(node, StatisticsNode):
        raise Refused(f"{location}: is neither a file of texts nor a statistics checkpoint")
    if node.kind != "gram":
        raise Refused(f"{location}: holds {node.kind} statistics", hint="`surgery statistics --kind gram` makes what is needed")
    wrong = node.mismatch([model.source] if isinstance(model, SourceNode) else [])
    if wrong and isinstance(model, SourceNode):
        raise Refused(f"{location}: {wrong}", hint="collect them from the fine-tuned model")
    return node
