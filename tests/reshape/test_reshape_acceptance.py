"""What the published methods claim, on language models of characters trained here in seconds.

XFT (arXiv 2404.15247): a dense model upcycled with a shared expert, tuned, and mixed back to a dense one. Layer dropping (arXiv
2403.17887): angular distances say which blocks can go, and a little training heals. MixtureGrowth: two narrow networks as one.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import surgery as command
from scipy.stats import spearmanr

import surgery
from surgery import steps
from surgery.reshape.learn_mixing import learn_mixing
from surgery.statistics.angular import angular_distances

LETTERS = {c: i for i, c in enumerate([chr(c) for c in range(32, 127)] + ["\n"])}
LENGTH = 40
Batch = Callable[[int, int], torch.Tensor]


def texts(*globs: str) -> Batch:
    """Batches of the standard library's sources: (texts, seed) -> ids."""
    root = Path(sysconfig.get_path("stdlib"))
    whole = "\n".join(p.read_text("utf-8", errors="ignore") for g in globs for p in sorted(root.glob(g)))[:300_000]
    ids = torch.tensor([LETTERS[c] for c in whole if c in LETTERS])

    def batch(count: int, seed: int) -> torch.Tensor:
        starts = torch.randint(len(ids) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
        return torch.stack([ids[i : i + LENGTH] for i in starts])

    return batch


GENERAL, TASK = texts("json/*.py", "email/*.py", "asyncio/*.py"), texts("xml/**/*.py")


def train(model: Any, data: Batch, count: int, rate: float, seed: int) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    model.train()
    for step in range(count):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1.02 - step / count)
        ids = data(12, 1000 * seed + step)
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def judge(model: Any, data: Batch) -> tuple[float, float]:
    """Negative log-likelihood per character and accuracy of the next one, on texts that are not trained on."""
    ids = data(128, 10**6)
    made = model(input_ids=ids, labels=ids, use_cache=False)
    return float(made.loss), float((made.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean())


def live(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def language_model(blocks: int) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.05,
        )
    )  # fmt: skip


def written(path: Path, data: Batch, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in data(count, 77)))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def xft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, a llama; `moe`, made of it with a shared expert; `tuned`, that after training on another text."""
    folder = tmp_path_factory.mktemp("xft")
    train(language_model(2), GENERAL, 150, 8e-3, seed=0).save_pretrained(folder / "dense")
    steps.upcycle(surgery.open(folder / "dense"), experts=4, top=2, shared=True, seed=1).save(folder / "moe")
    train(live(folder / "moe"), TASK, 150, 1e-2, seed=4).save_pretrained(folder / "tuned")
    written(folder / "task.jsonl", TASK, 200)
    return folder


def test_xft_begins_with_the_dense_model(xft: Path) -> None:
    ids = TASK(4, 3)
    with torch.no_grad():
        want, got = (live(xft / n)(input_ids=ids).logits for n in ("dense", "moe"))
    assert (want - got).abs().max() < 1e-5
    steps.downcycle(surgery.open(xft / "moe")).save(xft / "back", overwrite=True)
    assert json.loads((xft / "back" / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        assert (live(xft / "back")(input_ids=ids).logits - want).abs().max() < 1e-5


def test_xft_mixed_with_learned_shares(xft: Path) -> None:
    """The best share of the shared expert lies inside, and learned shares of the others are no worse than equal ones."""
    losses = {}
    for share in (0.0, 0.5, 0.75, 1.0):
        steps.downcycle(surgery.open(xft / "tuned"), shared_weight=share).save(xft / "mixed", overwrite=True)
        losses[share] = judge(live(xft / "mixed"), TASK)[0]
    assert min(losses[0.5], losses[0.75]) < min(losses[0.0], losses[1.0]) - 0.002, losses
    told = command("mixing", xft / "tuned", "--data", xft / "task.jsonl", "-o", xft / "shares", "--steps", "30",
                   "--rate", "0.1", "--json")  # fmt: skip
    assert told.returncode == 0, told.stderr
    said = json.loads(told.stdout)
    assert all(abs(sum(s) - 1.0) < 1e-6 and len(s) == 4 for s in said["shares"].values()) and len(said["shares"]) == 2
    assert min(said["losses"].values()) < said["losses"]["0"]
    steps.downcycle(surgery.open(xft / "tuned"), weights=str(xft / "shares")).save(xft / "mixed", overwrite=True)
    loss = judge(live(xft / "mixed"), TASK)[0]
    assert loss < losses[0.75] - 0.002
    given = {f"{block}.*": shares for block, shares in said["shares"].items()}
    steps.downcycle(surgery.open(xft / "tuned"), weights=given, shared_weight={"*": 0.75}).save(xft / "given", overwrite=True)
    assert judge(live(xft / "given"), TASK)[0] == pytest.approx(loss, abs=1e-5)


def test_shares_are_of_one_mixture(xft: Path, tmp_path: Path) -> None:
    """Anything else that is given as shares is refused, and says how to make them."""
    steps.upcycle(surgery.open(xft / "dense"), experts=3, top=2, shared=True).save(tmp_path / "other")
    written(tmp_path / "few.jsonl", TASK, 5)
    for folder, weights, words in (
        ("other", str(xft / "dense"), "has no mixing.json"),
        ("moe", {"model.layers.0.*": [0.25] * 4}, "no glob of `weights` matches `model.layers.1.mlp"),
        ("moe", {"*.nine": [0.25] * 4, "*": [0.25] * 4}, "no feed-forward matrix matches `\\*.nine`"),
        ("moe", {"*": [0.5] * 4}, "must sum to 1, they sum to 2"),
        ("moe", [0.5, 0.5], "has 2 values, the model 4 routed experts"),
    ):
        with pytest.raises(surgery.Refused, match=words):
            path = tmp_path / folder if folder == "other" else xft / folder
            steps.downcycle(surgery.open(path), weights=weights).plan()
    with pytest.raises(surgery.Refused, match="ten are the least"):
        learn_mixing(surgery.open(xft / "moe").node, tmp_path / "few.jsonl")


def test_dropped_blocks(tmp_path: Path) -> None:
    """What turns the hidden state least can go; three of six blocks are healed by a few steps."""
    whole = train(language_model(6), GENERAL, 200, 6e-3, seed=0)
    whole.save_pretrained(tmp_path / "whole")
    angles = angular_distances(str(tmp_path / "whole"), written(tmp_path / "texts.jsonl", GENERAL, 64), most=3)
    distances, losses, accuracy = [], [], {}
    for count in (1, 2, 3):
        for start in range(7 - count):
            steps.drop_layers(surgery.open(tmp_path / "whole"), count=count, start=start).save(tmp_path / "short", overwrite=True)
            loss, right = judge(live(tmp_path / "short"), GENERAL)
            distances.append(angles.distances[count][start])
            losses.append(loss)
            accuracy[count, start] = right
        assert spearmanr(distances[count - 7 :], losses[count - 7 :])[0] >= 0.6
    assert spearmanr(distances, losses)[0] >= 0.8
    single = {start: accuracy[1, start] for start in range(6)}
    assert single[angles.best(1)] > max(single.values()) - 0.01
    steps.drop_layers(surgery.open(tmp_path / "whole"), count=3, start=angles.best(3)).save(tmp_path / "short", overwrite=True)
    healed = train(live(tmp_path / "short"), GENERAL, 60, 3e-3, seed=9)
    assert judge(healed, GENERAL)[1] > judge(whole, GENERAL)[1] - 0.02


def test_a_grown_network_starts_ahead(tmp_path: Path) -> None:
    """Two narrow classifiers side by side, trained on for 60 steps, against a wide one from scratch after as many."""
    from safetensors.torch import save_file

    def network(width: int, seed: int) -> torch.nn.Sequential:
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
            torch.nn.Linear(width, 10, bias=False),
        )  # fmt: skip

    centres = torch.randn(10, 3, 64, generator=torch.Generator().manual_seed(0))

    def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        label, kind = (torch.randint(n, (count,), generator=generator) for n in (10, 3))
        return centres[label, kind] + 1.6 * torch.randn(count, 64, generator=generator), label

    def fit(net: torch.nn.Module, count: int, seed: int) -> float:
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        for step in range(count):
            x, y = examples(64, 1000 * seed + step)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        x, y = examples(2000, 10**6)
        return float((net(x).argmax(1) == y).float().mean())

    narrow = [network(24, s) for s in (1, 2)]
    for i, net in enumerate(narrow):
        fit(net, 300, i)
        save_file(net.state_dict(), tmp_path / f"{i}.safetensors")
    grown = steps.grow(*(surgery.open(tmp_path / f"{i}.safetensors") for i in (0, 1)), reads="0.weight", writes="4.weight")
    grown.save(tmp_path / "wide")
    wide = network(48, 3)
    wide.load_state_dict({n: surgery.open(tmp_path / "wide")[n].compute() for n in wide.state_dict()})
    x, _ = examples(100, 5)
    with torch.no_grad():
        assert (wide(x) - (narrow[0](x) + narrow[1](x)) / 2).abs().max() < 1e-5
    assert fit(wide, 60, 7) > fit(network(48, 3), 60, 7) + 0.05
