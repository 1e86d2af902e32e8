"""Models put together in logit space: formulas in float64, the acceptance figures at the digits rig's scale, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_rig import WORDS, Net, classifier, domains, jsonl, language_model, train, write_tokenizer
from scipy.special import log_softmax, softmax
from torch import nn
from torch.nn import functional as F

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab import combine
from surgery.lab.fused import read_fused

RNG = np.random.default_rng(0)


def random(*shape: int, scale: float = 2.0) -> np.ndarray:
    return log_softmax(RNG.standard_normal(shape) * scale, axis=-1)


def as_torch(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a).float() for a in arrays]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("beta, top_p", [(1.0, None), (0.5, None), (2.0, 0.9), (1.0, 0.2), (1.0, 1.0)])
def test_emulated_fine_tuning(beta: float, top_p: float | None) -> None:
    large, tuned, base = random(6, 3, 11), random(6, 3, 11), random(6, 3, 11)
    found = combine.emulated(*as_torch(large, tuned, base), beta=beta, top_p=top_p).numpy()
    for at in np.ndindex(6, 3):
        change = (tuned[at] - base[at]) / beta
        if top_p is not None:
            order, mass, kept = np.argsort(-large[at]), 0.0, set()
            for i in order:
                kept.add(i)
                mass += math.exp(large[at][i])
                if mass >= top_p:
                    break
            change = np.where([i in kept for i in range(11)], change, 0.0)
        np.testing.assert_allclose(found[at], log_softmax(large[at] + change), atol=1e-5)


def test_edited_and_averages() -> None:
    a, b, c = random(5, 7), random(5, 7), random(5, 7)
    found = combine.edited(*as_torch(a, b, c), scale=0.7).numpy()
    np.testing.assert_allclose(found, log_softmax(a + 0.7 * (b - c), axis=-1), atol=1e-5)
    found = combine.probabilities(as_torch(a, b, c), weights=[1.0, 0.0, 3.0]).numpy()
    np.testing.assert_allclose(np.exp(found), 0.25 * np.exp(a) + 0.75 * np.exp(c), atol=1e-6)
    found = combine.logits(as_torch(a, b, c)).numpy()
    np.testing.assert_allclose(found, log_softmax((a + b + c) / 3, axis=-1), atol=1e-5)


def test_dynamic_fusion_searches_the_grid() -> None:
    large, base, tuned = (random(8, 9, scale=0.6) for _ in range(3))
    tuned = [tuned, random(8, 9, scale=0.6)]
    grid = np.arange(21) * 0.1

    def best(p: np.ndarray, move: np.ndarray, goal: float) -> float:
        return float(min(grid, key=lambda a: abs(kl(log_softmax(p + a * move), p) - goal)))

    for experts in ([tuned[0]], tuned):
        found = combine.dynamic(torch.from_numpy(large).float(), as_torch(*experts), torch.from_numpy(base).float()).numpy()
        for i in range(8):
            goals = [kl(q[i], base[i]) for q in experts]
            total = sum(best(large[i], q[i] - base[i], g) * (q[i] - base[i]) for q, g in zip(experts, goals, strict=True))
            if len(experts) > 1:
                total = best(large[i], total, float(np.mean(goals))) * total
            np.testing.assert_allclose(found[i], log_softmax(large[i] + total), atol=1e-4)


def test_dynamic_fusion_leaves_the_model_alone_where_the_expert_learned_nothing() -> None:
    large, base = as_torch(random(4, 9), random(4, 9))
    assert torch.allclose(combine.dynamic(large, [base], base), large, atol=1e-5)
    zero = combine.dynamic(large, [torch.from_numpy(random(4, 9)).float()], base, most=0.0)
    assert torch.allclose(zero, large, atol=1e-5)


# -- the figures of the papers, at the scale of the rig ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.ln(x))))


class Residual(nn.Module):
    """A pre-norm residual MLP; the rig's large one has 64 and 6, its small one 32 and 2."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(64, width), nn.LayerNorm(width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x.reshape(len(x), -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tune(model: nn.Module, images: np.ndarray, labels: np.ndarray, *, steps: int, lr: float) -> nn.Module:
    """Head frozen, warm-up and cosine, clipped gradients."""
    torch.manual_seed(1)
    weights = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for i in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * i / steps))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def copied(model: nn.Module, width: int, depth: int) -> nn.Module:
    made = Residual(width, depth)
    made.load_state_dict(model.state_dict())
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A small and a large model of five domains, before and after they were tuned on one."""
    data = domains()
    clean, order = data["clean"], np.random.default_rng(3).permutation(64)
    ways = {
        "rot180": lambda x: np.rot90(x, 2, axes=(2, 3)).copy(),
        "perm": lambda x: x.reshape(len(x), 64)[:, order].reshape(x.shape),
    }
    data |= {n: {s: (way(clean[s][0]), clean[s][1]) for s in clean} for n, way in ways.items()}
    mixed = [np.concatenate([s["train"][i][:150] for s in data.values()]) for i in (0, 1)]
    made: dict = {}
    for name, sizes, steps, lr in (("small", (32, 2), 400, 1e-2), ("large", (64, 6), 150, 7e-4)):
        torch.manual_seed(0)
        base = train(Residual(*sizes), *mixed, steps=150, lr=1.5e-3 if name == "small" else 1e-3, seed=0, freeze_head=False)
        made[name] = base.eval()
        made[f"{name}_tuned"] = tune(copied(base, *sizes), *data["rot90"]["train"], steps=steps, lr=lr)
    folder = tmp_path_factory.mktemp("pairs")
    np.savez(folder / "test.npz", images=data["rot90"]["test"][0], labels=data["rot90"]["test"][1])
    made["task"] = lab.make_task("rot90", {"kind": "images", "test": "test.npz"}, folder=folder)
    return made


def accuracy(pairs: dict, model: object) -> float:
    return lab.evaluate(model, pairs["task"])["rot90"]["accuracy"].value


def test_up_scaling_closes_the_gap(pairs: dict) -> None:
    """Emulated fine-tuning: at least 85 % of what tuning the large model itself gains (METHODS: .873 -> .976 of .978)."""
    base, goal = accuracy(pairs, pairs["large"]), accuracy(pairs, pairs["large_tuned"])
    members = {"large": pairs["large"], "tuned": pairs["small_tuned"], "base": pairs["small"]}
    found = accuracy(pairs, lab.fuse("emulated", **members))
    assert goal > base + 0.03 and found >= base + 0.85 * (goal - base)
    careful = accuracy(pairs, lab.fuse("emulated", **members, top_p=0.95))
    assert base < careful
    assert accuracy(pairs, lab.fuse("dynamic", **members)) >= base + 0.5 * (goal - base)
    assert accuracy(pairs, lab.fuse("dynamic", **members, most=0.0)) == base


def test_the_delta_of_an_edited_small_model(pairs: dict) -> None:
    """An edit of one class reaches the large model; other classes keep their accuracy to a point."""
    data = domains()["clean"]
    edited = copied(pairs["small"], 32, 2)
    images, labels = data["train"]
    fours, calm = torch.from_numpy(images[labels == 4]), torch.from_numpy(images[labels != 4])
    optimizer = torch.optim.AdamW(edited.parameters(), lr=2e-3)
    before = torch.log_softmax(pairs["small"](calm), -1).detach()
    for _ in range(200):  # fours become sevens, all else stays
        after = torch.log_softmax(edited(calm), -1)
        loss = (
            F.cross_entropy(edited(fours), torch.full((len(fours),), 7)) + 5 * (before.exp() * (before - after)).sum(-1).mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = torch.from_numpy(data["test"][0]), data["test"][1]
    model = lab.fuse("edited", large=pairs["large"], edited=edited.eval(), original=pairs["small"])
    from surgery.lab.evaluation import Evaluator

    fused = Evaluator(pairs["task"]).subject(model).module
    with torch.inference_mode():
        plain, said = pairs["large"](x).argmax(1).numpy(), fused(x).argmax(1).numpy()
    assert (said[y == 4] == 7).mean() >= (plain[y == 4] == 7).mean() + 0.5
    others = y != 4
    assert (said[others] == y[others]).mean() >= (plain[others] == y[others]).mean() - 0.01


def test_an_ensemble_of_few_shot_models_has_a_lower_loss_than_each(pairs: dict) -> None:
    images, labels = domains()["rot90"]["train"]
    members = []
    for i in range(4):
        one = copied(pairs["small"], 32, 2)
        members.append(
            train(
                one, images[i * 60 : i * 60 + 60], labels[i * 60 : i * 60 + 60], steps=60, lr=3e-3, seed=i, freeze_head=False
            ).eval()
        )
    losses = [lab.evaluate(m, pairs["task"])["rot90"]["nll"].value for m in members]
    found = lab.evaluate(lab.fuse("probabilities", members=members), pairs["task"])["rot90"]["nll"].value
    assert found < min(losses)


# -- language models, files, the command's world -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fused")
    for i, name in enumerate(("big", "small", "tuned")):
        language_model(made / name, seed=i)
    jsonl(made / "ch.jsonl", [{"prompt": "the film was", "choices": ["good", "very bad"], "answer": 0}] * 3)
    (made / "text.txt").write_text("the film was very good not a bad plot " * 8)
    (made / "tasks.yaml").write_text(
        "tasks:\n  prose: {kind: perplexity, test: text.txt, length: 16}\n  ch: {kind: choice, test: ch.jsonl}\n"
    )
    (made / "up.yaml").write_text("ensemble:\n  kind: emulated\n  large: big\n  tuned: tuned\n  base: small\n  beta: 2\n")
    return made


@torch.inference_mode()
def test_language_models_from_a_file(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    models = {n: LlamaForCausalLM.from_pretrained(folder / n).eval() for n in ("big", "tuned", "small")}
    report = lab.evaluate(folder / "up.yaml", folder / "tasks.yaml", reference=folder / "big")
    ids = AutoTokenizer.from_pretrained(folder / "big")((folder / "text.txt").read_text())["input_ids"]
    total, apart, at = 0.0, 0.0, 1
    while at < len(ids):
        window = ids[max(0, at - 1) : max(0, at - 1) + 16]
        p = {n: log_softmax(m(torch.tensor([window])).logits[0].double().numpy(), axis=-1) for n, m in models.items()}
        q = log_softmax(p["big"] + (p["tuned"] - p["small"]) / 2, axis=-1)
        for j in range(len(window) - 1):
            total -= q[j, window[j + 1]]
            apart += kl(p["big"][j], q[j])
        at += len(window) - 1
    assert report["prose"]["nll"].value == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert report["prose"]["kl"].value == pytest.approx(apart / (len(ids) - 1), rel=1e-4)
    assert {"accuracy", "kl"} <= report["ch"].keys()


def test_a_member_may_be_a_recipe(folder: Path) -> None:
    (folder / "mix.yaml").write_text(
        "models: {a: big, b: tuned}\nsteps:\n  out: {op: lerp, of: [a, b], alpha: 0.5}\noutput: {from: out}\n"
    )
    (folder / "of.yaml").write_text("ensemble: {kind: logits, members: [mix.yaml, big], weights: [1, 0]}\n")
    task = lab.make_task("prose", {"kind": "perplexity", "test": "text.txt", "measures": ["nll"]}, folder=folder)
    one, other = (lab.evaluate(folder / n, task)["prose"]["nll"].value for n in ("of.yaml", "mix.yaml"))
    assert one == pytest.approx(other, rel=1e-6)


def test_generation_is_greedy_on_the_combined_logits(folder: Path) -> None:
    from surgery.lab.evaluation import Evaluator
    from surgery.lab.generating import with_generation

    task = lab.make_task("prose", {"kind": "perplexity", "test": "text.txt"}, folder=folder)
    subject = Evaluator(task).subject(folder / "up.yaml")
    ids = torch.tensor([[5, 4, 6]])
    made = with_generation(subject.module).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    for _ in range(4):
        with torch.inference_mode():
            ids = torch.cat([ids, subject.module(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize(
    "said, problem",
    [
        (
            "{kind: emulate, large: big}",
            r"up2.yaml:1:12: there is no `kind` of ensemble 'emulate'\nhint: did you mean `emulated`",
        ),
        ("{large: big}", "is a map with a `kind`"),
        ("{kind: emulated, large: big, tuned: tuned}", "`emulated` needs `base`"),
        ("{kind: emulated, large: big, tuned: tuned, base: small, beta: 0}", r"1:\d+: `beta` must be a number, above 0, got 0"),
        (
            "{kind: emulated, large: big, tuned: tuned, base: small, top_p: 1.5}",
            "`top_p` must be a number, above 0 and at most 1",
        ),
        ("{kind: emulated, large: big, tuned: tuned, base: small, bta: 1}", "has no key `bta`\nhint: did you mean `beta`"),
        ("{kind: emulated, large: [big, big], tuned: tuned, base: small}", "`large` is one model, got 2"),
        ("{kind: logits, members: [big]}", "`members` names 1 model, expected two or more"),
        ("{kind: logits, members: [big, tuned], weights: [1, -1]}", "`weights` must be 2 numbers"),
        ("{kind: logits, members: [big, 3]}", "a member must be a path or a hub id, got 3"),
    ],
)
def test_files_that_are_wrong(folder: Path, said: str, problem: str) -> None:
    (folder / "up2.yaml").write_text(f"ensemble: {said}\n")
    with pytest.raises(Refused, match=problem):
        read_fused(folder / "up2.yaml")


def test_members_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    task = lab.make_task("prose", {"kind": "perplexity", "test": "text.txt"}, folder=folder)
    classifier(tmp_path / "c", ["no", "yes"])
    with pytest.raises(Refused, match="they give no common prediction"):
        lab.evaluate(lab.fuse("logits", members=[folder / "big", tmp_path / "c"]), task)
    language_model(tmp_path / "other", seed=3)
    write_tokenizer(tmp_path / "other", [WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]])
    with pytest.raises(Refused, match=r"tokenizers of big and other differ, at"):
        lab.evaluate(lab.fuse("logits", members=[folder / "big", tmp_path / "other"]), task)
    images = lab.make_task("d", {"kind": "images", "test": "x.npz"}, folder=tmp_path)
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 1, 8, 8), np.float32), labels=np.zeros(2, int))
    with pytest.raises(Refused, match="different numbers of classes"):
        lab.evaluate(lab.fuse("logits", members=[Net(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]), images)


def test_softmax_of_what_comes_out_sums_to_one() -> None:
    found = combine.emulated(*as_torch(random(4, 5), random(4, 5), random(4, 5)))
    np.testing.assert_allclose(softmax(found.numpy(), axis=-1).sum(-1), 1.0, rtol=1e-6)
    assert torch.allclose(found.exp().sum(-1), torch.ones(4))
