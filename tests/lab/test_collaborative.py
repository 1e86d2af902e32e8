"""Collaborative decoding: who speaks at every prediction, how a gate is learned and kept, and what it is worth on the digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from lab_rig import Net, classifier, jsonl, language_model, state
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import nn

import surgery.lab as lab
from surgery.cli.eval_ import command
from surgery.errors import Refused
from surgery.lab.evaluation import Evaluator
from surgery.lab.fused import read_fused
from surgery.lab.gate import SAID, Gate, fit, said_by

RNG = np.random.default_rng(7)


def test_features_are_what_they_are_called() -> None:
    p, q = (log_softmax(RNG.standard_normal((5, 6)) * 3, axis=-1) for _ in range(2))
    p[0, 2] = -np.inf  # ruled out
    p[0] -= np.log(np.exp(p[0]).sum())
    found = said_by(torch.from_numpy(p), torch.from_numpy(q)).numpy()
    for i in range(5):
        a, b = np.maximum(p[i], -30), np.maximum(q[i], -30)
        ours, theirs = np.exp(p[i]), np.exp(q[i])
        wanted = [
            -(ours * a).sum(), -(theirs * b).sum(), ours.max(), theirs.max(), (ours * (a - b)).sum(), (theirs * (b - a)).sum(),
            a[b.argmax()], b[a.argmax()], float(a.argmax() == b.argmax()),
        ]  # fmt: skip
        np.testing.assert_allclose(found[i], wanted, rtol=1e-10)
    assert found.shape[-1] == len(SAID)


def test_a_gate_is_the_weighted_logistic_regression() -> None:
    x = RNG.standard_normal((300, 3)) * [1, 10, 0.1] + [0, 5, 0]
    gain = np.where(x[:, 0] + RNG.standard_normal(300) * 0.5 > 0.3, 1.0, -1.0) * RNG.random(300)
    share = np.where(np.arange(300) < 100, 0.01, 0.005)
    made = fit("predictions", x, gain, share, 0.01, {})
    z = (x - x.mean(0)) / x.std(0)
    weight = share * abs(gain) / (share * abs(gain)).sum()

    def loss(v: np.ndarray) -> float:
        said = z @ v[:3] + v[3]
        right = 1 / (1 + np.exp(-said))
        each = -np.where(gain > 0, np.log(right), np.log(1 - right))
        return float((weight * each).sum() + 0.005 * (v[:3] ** 2).sum())

    best = minimize(loss, np.zeros(4), method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-12}).x
    np.testing.assert_allclose([*made.weights, made.bias], best, atol=2e-3)
    said = (z @ made.weights + made.bias) >= 0
    assert (made.tuned(torch.from_numpy(x)).numpy() == said).all()
    assert (share * gain)[said].sum() >= max(0.0, (share * gain).sum())


def test_a_gate_that_would_do_harm_is_one_model_alone() -> None:
    """Where features say nothing, the better model speaks everywhere."""
    x = np.zeros((50, 2))
    for sign, who in ((1, "tuned"), (-1, "base")):
        made = fit("predictions", x, sign * np.where(np.arange(50) % 5, 1.0, -1.0), np.full(50, 0.02), 1e-3, {})
        assert made.tuned(torch.zeros(4, 2)).tolist() == [who == "tuned"] * 4
    noisy = fit("predictions", RNG.standard_normal((6, 2)), np.array([1, 1, 1, 1, 1, 1.0]), np.ones(6), 1e-3, {})
    assert noisy.tuned(torch.from_numpy(RNG.standard_normal((9, 2)))).all()


@pytest.fixture(scope="module")
def pair(rig: Path) -> dict[str, Net]:
    made = {}
    for role, name in (("tuned", "rot90"), ("base", "base")):
        made[role] = Net()
        made[role].load_state_dict(state(rig / name))
    return made


def mean(model: object, work: Path, measure: str = "accuracy") -> float:
    report = lab.evaluate(model, work / "tasks.yaml")
    return float(np.mean([report[d][measure].value for d in ("clean", "rot90", "inv")]))


def test_the_gate_is_worth_it_and_the_oracle_is_the_bound(work: Path, pair: dict[str, Net]) -> None:
    alone = {n: mean(m, work) for n, m in pair.items()}
    learned = {f: mean(lab.fuse("collaborative", features=f, **pair), work) for f in ("predictions", "hidden", "both")}
    oracle = mean(lab.fuse("collaborative", gate="oracle", **pair), work)
    assert min(learned.values()) >= max(alone.values()) - 0.005
    assert max(learned.values()) > max(alone.values())
    assert oracle >= max(*alone.values(), *learned.values())
    x, y = (np.load(work / "data" / "rot90-test.npz")[n] for n in ("images", "labels"))
    right = [(m.eval()(torch.from_numpy(x)).argmax(1).numpy() == y) for m in pair.values()]
    found = lab.evaluate(lab.fuse("collaborative", gate="oracle", **pair), work / "tasks.yaml")["rot90"]["accuracy"].value
    assert found == pytest.approx((right[0] | right[1]).mean())  # right wherever either is


def test_every_prediction_is_one_of_the_two(work: Path, pair: dict[str, Net]) -> None:
    gate = lab.fit_gate(lab.fuse("collaborative", **pair), work / "tasks.yaml")
    fused = Evaluator(work / "tasks.yaml").subject(lab.fuse("collaborative", gate=gate, **pair)).module
    x = torch.from_numpy(np.load(work / "data" / "clean-test.npz")["images"])
    with torch.inference_mode():
        tuned, base = (torch.log_softmax(m.eval()(x), -1) for m in pair.values())
        who = gate.tuned(said_by(tuned, base))
        assert torch.equal(fused(x), torch.where(who[:, None], tuned, base))
    assert 0.05 < who.float().mean() < 0.95
    assert gate.fitted["tasks"] == {"clean": 300, "rot90": 300, "inv": 300} and gate.fitted["predictions"] == 900


def test_a_gate_is_kept_and_read_from_the_command_line(work: Path, tmp_path: Path) -> None:
    said = f"{{kind: collaborative, tuned: {work}/rot90, base: {work}/base"
    (tmp_path / "pair.yaml").write_text(f"ensemble: {said}, features: both, examples: 100}}\n")
    (tmp_path / "kept.yaml").write_text(f"ensemble: {said}, gate: gate.json}}\n")
    common = ["--tasks", str(work / "tasks.yaml"), "--module", f"{work}/net.py:build", "--resamples", "10", "--json"]

    def evaluated(file: str, *more: str) -> Result:
        return CliRunner().invoke(command, [str(tmp_path / file), *common, *more])

    first = evaluated("pair.yaml", "--keep-gate", str(tmp_path / "gate.json"))
    assert first.exit_code == 0, first.output
    kept = (tmp_path / "gate.json").read_bytes()
    said_of = json.loads(kept)
    assert said_of["format"] == "surgery-gate/1" and said_of["fitted"]["tasks"] == {"clean": 100, "rot90": 100, "inv": 100}
    a, b = (json.loads(r.stdout)["models"][0]["tasks"] for r in (first, evaluated("kept.yaml")))
    assert a == b
    again = evaluated("pair.yaml", "--keep-gate", str(tmp_path / "gate.json"))
    assert isinstance(again.exception, Refused) and "gate.json: exists already" in str(again.exception)
    assert (tmp_path / "gate.json").read_bytes() == kept
    assert evaluated("pair.yaml", "--keep-gate", str(tmp_path / "same.json")).exit_code == 0
    assert (tmp_path / "same.json").read_bytes() == kept  # nothing is left to chance
    lost = evaluated("kept.yaml", "--keep-gate", str(tmp_path / "x.json"))
    assert isinstance(lost.exception, Refused) and "gate is learned: no such model here" in str(lost.exception)


# -- tokens ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("collaborative")
    for i, name in enumerate(("base", "tuned")):
        language_model(made / name, seed=i)
    (made / "text.txt").write_text("the film was very good not a bad plot " * 8)
    (made / "other.txt").write_text("a very bad film the plot was not good saw Rome in " * 20)
    jsonl(made / "ch.jsonl", [{"prompt": "the film was", "choices": ["good", "very bad"], "answer": i % 2} for i in range(6)])
    (made / "tasks.yaml").write_text(
        "tasks:\n  prose: {kind: perplexity, validation: other.txt, test: text.txt, length: 16}\n"
        "  ch: {kind: choice, validation: ch.jsonl, test: ch.jsonl}\n"
    )
    return made


@torch.inference_mode()
def test_a_token_is_given_by_the_model_that_the_gate_names(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    pair = {"tuned": folder / "tuned", "base": folder / "base"}
    gate = lab.fit_gate(lab.fuse("collaborative", features="hidden", **pair), folder / "tasks.yaml")
    assert len(gate.weights) == 16 and gate.fitted["tasks"]["ch"] == 9  # three options of one token, three of two
    models = {n: LlamaForCausalLM.from_pretrained(folder / n).eval() for n in pair}
    ids = AutoTokenizer.from_pretrained(folder / "base")((folder / "text.txt").read_text())["input_ids"]
    learned, oracle, at = 0.0, 0.0, 1
    while at < len(ids):
        window = torch.tensor([ids[at - 1 : at + 15]])
        p = {n: torch.log_softmax(m(window).logits[0].float(), -1) for n, m in models.items()}
        hidden = models["base"](window, output_hidden_states=True).hidden_states[-1][0]
        who = gate.tuned(hidden)
        for j in range(window.shape[1] - 1):
            token = int(window[0, j + 1])
            learned -= float(p["tuned" if who[j] else "base"][j, token])
            oracle -= max(float(p["tuned"][j, token]), float(p["base"][j, token]))
        at += window.shape[1] - 1
    fused = lab.evaluate(lab.fuse("collaborative", gate=gate, **pair), folder / "tasks.yaml")["prose"]["nll"].value
    assert fused == pytest.approx(learned / (len(ids) - 1), rel=1e-5)
    bound = lab.evaluate(lab.fuse("collaborative", gate="oracle", **pair), folder / "tasks.yaml")
    assert bound["prose"]["nll"].value == pytest.approx(oracle / (len(ids) - 1), rel=1e-5)
    alone = [lab.evaluate(pair[n], folder / "tasks.yaml") for n in pair]
    assert bound["prose"]["nll"].value < min(a["prose"]["nll"].value for a in alone)
    assert bound["ch"]["accuracy"].value >= max(a["ch"]["accuracy"].value for a in alone)


def test_what_cannot_be_done_is_said_in_one_line(work: Path, pair: dict[str, Net], folder: Path, tmp_path: Path) -> None:
    test_only = lab.make_task("rot90", {"kind": "images", "test": "rot90-test.npz"}, folder=work / "data")
    with pytest.raises(Refused, match="a learned gate is fitted on validation splits, and no task here has one\nhint: valid"):
        lab.evaluate(lab.fuse("collaborative", **pair), test_only)
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(Refused, match="different numbers of classes apart: Net 10, Sequential 3"):
        lab.evaluate(lab.fuse("collaborative", tuned=pair["tuned"], base=few), work / "tasks.yaml")
    both = {"tuned": few, "base": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}
    with pytest.raises(Refused, match=r"label 9: the models know 3 classes, 0 to 2"):
        lab.evaluate(lab.fuse("collaborative", **both), work / "tasks.yaml")
    oracle = lab.fuse("collaborative", gate="oracle", **pair)
    with pytest.raises(Refused, match="an oracle looks at the right answers"):
        lab.evaluate(lab.fuse("logits", members=[oracle, pair["base"]]), work / "tasks.yaml")
    gate = lab.fit_gate(lab.fuse("collaborative", features="hidden", **pair), work / "tasks.yaml")
    with pytest.raises(Refused, match="its gate looks at 48 numbers, these models give 16"):
        lab.evaluate(lab.fuse("collaborative", tuned=folder / "tuned", base=folder / "base", gate=gate), folder / "tasks.yaml")
    classifier(tmp_path / "c", ["no", "yes"])
    with pytest.raises(Refused, match="they give no common prediction"):
        lab.evaluate(lab.fuse("collaborative", tuned=tmp_path / "c", base=folder / "base"), folder / "tasks.yaml")
    jsonl(tmp_path / "v.jsonl", [{"text": "good film", "label": "maybe"}])
    rows = lab.make_task("c", {"kind": "classification", "validation": "v.jsonl"}, folder=tmp_path)
    with pytest.raises(Refused, match="row 1: the model knows no label 'maybe'"):
        lab.evaluate(lab.fuse("collaborative", tuned=tmp_path / "c", base=tmp_path / "c"), rows, split="validation")


@pytest.mark.parametrize(
    "said, problem",
    [
        ("gate: orakel", r"p.yaml:1:\d+: .*orakel: no gate"),
        ("gate: 3", "`gate` must be one of learned, oracle, or a file, got 3"),
        ("features: entropy", "`features` must be one of predictions, hidden, both, got 'entropy'"),
        ("penalty: -1", "`penalty` must be a number, at least 0"),
        ("gat: oracle", "has no key `gat`\nhint: did you mean `gate`"),
        ("gate: broken.json", "broken.json: no gate: its `format` is not 'surgery-gate/1'"),
        ("gate: short.json", "short.json: not a whole gate: 2 weights for 9 features"),
    ],
)
def test_files_that_are_wrong(folder: Path, said: str, problem: str) -> None:
    (folder / "broken.json").write_text("{}")
    Gate("predictions", np.zeros(2), np.ones(2), np.zeros(2), 0.0).save(folder / "short.json")
    (folder / "p.yaml").write_text(f"ensemble: {{kind: collaborative, tuned: tuned, base: base, {said}}}\n")
    with pytest.raises(Refused, match=problem):
        read_fused(folder / "p.yaml")
