"""Calibrated packages on live models: from texts or statistics to a package that applies without either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_checkpoint, same, surgery

from surgery.delta.calibration import fit
from surgery.delta.calibration.data import read_texts, tuned_model
from surgery.delta.calibration.layers import in_order, inputs_of
from surgery.delta.calibration.session import calibration, witness
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.container import Package
from surgery.delta.lossy.inputs import Inputs
from surgery.delta.pack import pack
from surgery.delta.rebuild import PackageNode
from surgery.inputs import open_node

transformers = pytest.importorskip("transformers")
VOCAB, HIDDEN = 40, 24
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sequences(count: int, seed: int) -> list[list[int]]:
    """Counting in steps, modulo the vocabulary: something to learn."""
    rng = np.random.default_rng(seed)
    return [[int(a + b * i) % VOCAB for i in range(14)] for a, b in rng.integers(1, VOCAB, (count, 2))]


def others() -> list[list[int]]:
    known = sequences(48, 1)
    return [s for s in sequences(60, 2) if s not in known][:20]


def trained(model: Any, steps: int, rate: float, shift: int = 0) -> Any:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for i in range(steps):
        ids = torch.tensor(sequences(16, 1000 + i))
        loss = model(input_ids=(ids + shift) % VOCAB, labels=(ids * (1 + shift) + shift) % VOCAB).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder of two blocks that learnt to count, tuned to count otherwise; the same shape as a GPT-2; texts."""
    folder = tmp_path_factory.mktemp("rig")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    gpt = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    for name, kind, about in (("", "LlamaForCausalLM", config), ("gpt-", "GPT2LMHeadModel", gpt)):
        model = trained(getattr(transformers, kind)(about).train(), 60 if not name else 10, 1e-2)
        model.save_pretrained(folder / f"{name}base")
        trained(model, 60 if not name else 10, 3e-3, shift=1).save_pretrained(folder / f"{name}tuned")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"input_ids": s}) + "\n" for s in sequences(48, 1)))
    (folder / "other.jsonl").write_text("".join(json.dumps({"input_ids": s}) + "\n" for s in others()))
    return {n: folder / n for n in ("base", "tuned", "gpt-base", "gpt-tuned", "texts.jsonl", "other.jsonl")}


def made(
    rig: dict[str, Path], out: Path, codec: str, *, calib: bool = True, repair: int = 0, kind: str = "", **options: Any
) -> Any:
    """The evaluation of a package with every matrix in the blocks coded so."""
    base, tuned = (open_node(str(rig[f"{kind}{n}"])) for n in ("base", "tuned"))
    chosen, texts = lossy_codec(codec), str(rig["texts.jsonl"])

    def choose(tensor: Any) -> Any:
        return (chosen, options) if len(tensor.shape) == 2 and (".layers." in tensor.name or ".h." in tensor.name) else None

    with calibration(base, tuned, texts if calib else None, repair=repair) as session:
        fitted = session.fit(choose) if calib else None
        looks = witness(session, fitted, str(rig["other.jsonl"]))
        pack(base, tuned, out, choose=fitted.choose if fitted else choose, judge=looks, overwrite=True, threads=2)
    return Package(str(out)).manifest.data


def test_command_line(rig: dict[str, Path], tmp_path: Path) -> None:
    """Packed with texts, inspected, applied by a process that never loads torch, verified."""
    out = tmp_path / "p.delta.safetensors"
    common = ["--base", rig["base"], "--model", rig["tuned"], "-o", out]
    found = surgery("delta", "pack", *common, "--bits", "2", "--calib", rig["texts.jsonl"])
    assert found.returncode == 0, found.stderr
    assert "fitted  to texts.jsonl (40 texts, 560 tokens): 14 by dither/1" in found.stderr
    assert "outputs error of logits" in found.stderr and "same answer" in found.stderr
    view = json.loads(surgery("delta", "inspect", out, "--json").stdout)
    assert view["calibration"]["fitted"] == {"dither/1": 14} and view["evaluation"]["held_out"]
    assert 0 < view["evaluation"]["kl"] < 0.5 and view["evaluation"]["agree"] > 0.8
    coded = [t for t in view["tensors"] if t["codec"] == "dither/1"]
    assert all(t["bits"] <= 2 and 0 < t["error"]["output"] < 1 for t in coded)
    assert "out err" in surgery("delta", "inspect", out).stdout
    script = (
        "import sys; from surgery.cli import main\n"
        f"sys.argv = ['surgery', 'delta', 'apply', {str(out)!r}, '--base', {str(rig['base'])!r}, '-o', {str(tmp_path / 'o')!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'scipy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert surgery("delta", "verify", out, "--base", rig["base"]).returncode == 0
    rebuilt, tuned = read_checkpoint(tmp_path / "o"), read_checkpoint(rig["tuned"])
    untouched = [n for n in tuned if n not in {t["name"] for t in coded}]
    same({n: rebuilt[n] for n in untouched}, {n: tuned[n] for n in untouched})


@pytest.mark.parametrize("kind", ["", "gpt-"])
def test_fitted_packages_do_less_to_outputs(rig: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Llama's weights are stored (out, in), GPT-2's (in, out)."""
    for codec, options in (("group", {"bits": 2, "group": 24}), ("round", {"bits": 1.5}), ("dither", {"bits": 1.5})):
        blind = made(rig, tmp_path / "a", codec, calib=False, kind=kind, **options)
        fitted = made(rig, tmp_path / "b", codec, kind=kind, **options)
        assert "calibration" not in blind and sum(fitted["calibration"]["fitted"].values()) == (14 if not kind else 8)
        if codec == "round":
            assert fitted["evaluation"]["error"] < 0.5 * blind["evaluation"]["error"]
        if codec == "dither":  # small matrices leave it hardly any choice: tables take a part of their bits
            assert fitted["evaluation"]["error"] < 1.5 * blind["evaluation"]["error"]
            continue
        assert fitted["evaluation"]["agree"] >= blind["evaluation"]["agree"] - 0.01
        assert all(0 < e["layer"]["error"]["output"] < 0.5 for e in fitted["tensors"].values() if "parts" in e.get("layer", {}))


def test_evaluation_is_what_the_rebuilt_model_does(rig: dict[str, Path], tmp_path: Path) -> None:
    """Against logits of the model that `apply` writes, computed here."""
    said = made(rig, tmp_path / "p.delta.safetensors", "group", bits=3)["evaluation"]
    node = PackageNode(Package(str(tmp_path / "p.delta.safetensors")), open_node(str(rig["base"])))
    from surgery.delta.apply import apply

    apply(node, tmp_path / "o")
    logits = {}
    for name, folder in (("base", rig["base"]), ("tuned", rig["tuned"]), ("got", tmp_path / "o")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found = [model(input_ids=torch.tensor([s])).logits[0].double() for s in others()]
        logits[name] = torch.cat(found).numpy()
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits["tuned"], logits["got"]))
    assert said["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert said["agree"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.005)
    off, away = (np.square(logits[n] - logits["tuned"]).sum() for n in ("got", "base"))
    assert said["error"] == pytest.approx(off / away, rel=1e-3)
    assert (said["texts"], said["tokens"], said["held_out"]) == (20, 280, True)


def test_inputs_come_from_the_model_as_it_will_be(rig: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer is fitted to is what flows into it when everything before is rebuilt and everything after is as tuned."""
    base, tuned = (open_node(str(rig[n])) for n in ("base", "tuned"))
    codec, seen = lossy_codec("group"), {}

    def watch(live: Any, texts: Any, layer: Any) -> Any:
        seen[layer.name] = inputs_of(live, texts, layer)
        return seen[layer.name]

    monkeypatch.setattr(fit, "inputs_of", watch)
    with calibration(base, tuned, str(rig["texts.jsonl"])) as session:
        found = session.fit(lambda t: (codec, {"bits": 2}) if ".layers." in t.name and len(t.shape) == 2 else None)
        names = list(found.codes)
        rebuilt = {n: session.deltas.rebuilt(n, *found.codes[n]) for n in names}
        texts = session.texts.fit
    assert list(seen) == [n for n in names if any(k in n for k in ("q_proj", "o_proj", "gate_proj", "down_proj"))]
    last = "model.layers.1.mlp.down_proj.weight"
    for name in (last, "model.layers.1.self_attn.o_proj.weight"):
        model = transformers.AutoModelForCausalLM.from_pretrained(rig["tuned"]).eval()
        state = model.state_dict()
        for before in names[: names.index(name)]:
            state[before].copy_(torch.from_numpy(rebuilt[before]))
        rows: list[torch.Tensor] = []
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda m, x, rows=rows: rows.append(x[0][0])
        )
        with torch.no_grad():
            for ids in texts:
                model(input_ids=torch.tensor([ids]))
        x = torch.cat(rows).double().numpy()
        np.testing.assert_allclose(seen[name].gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    tuned_again = tuned_model(tuned)
    group = next(g for g in in_order(tuned_again.live, texts, set(names)) if g[0].name == last)
    assert np.abs(inputs_of(tuned_again.live, texts, group[0]).gram - seen[last].gram).max() > 1e-3  # the prefix shows


def test_layers_fed_alike_share_their_inputs(rig: dict[str, Path]) -> None:
    tuned = tuned_model(open_node(str(rig["tuned"])))
    texts = read_texts(str(rig["texts.jsonl"]), tuned, samples=8, length=64)
    names = {n for n in tuned.parameters if ".layers." in n}
    found = [[layer.name.split(".")[-2] for layer in group] for group in in_order(tuned.live, texts.fit, names)]
    assert found == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_distilled_scales(rig: dict[str, Path], tmp_path: Path) -> None:
    """BitDelta's distillation: outputs get nearer than with gain-corrected scales; nothing but scales changes."""
    blind = made(rig, tmp_path / "a", "sign", calib=False)
    fitted = made(rig, tmp_path / "b", "sign")
    assert fitted["evaluation"]["error"] < 0.8 * blind["evaluation"]["error"]
    signs = [[p[2] for p in m["parts"] if p[0].endswith("/signs")] for m in (blind, fitted)]
    assert signs[0] == signs[1] and len(signs[0]) == 14


def test_tuned_codebooks(rig: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PV-Tuning: trained words and scales bring outputs far nearer than words fitted layer by layer; words change places only
    where the loss on the texts falls for it."""
    from surgery.delta.calibration import codebooks

    how = {"dims": 2, "width": 4}
    monkeypatch.setattr(codebooks, "tune_codebooks", lambda *given, **more: 0)
    fitted = made(rig, tmp_path / "a", "vq", **how)
    monkeypatch.undo()
    losses = []
    judged = codebooks._Moves._loss
    monkeypatch.setattr(codebooks._Moves, "_loss", lambda self: losses.append(judged(self)) or losses[-1])
    tuned = made(rig, tmp_path / "b", "vq", **how)
    assert tuned["evaluation"]["error"] < 0.3 * fitted["evaluation"]["error"]
    assert tuned["evaluation"]["kl"] < fitted["evaluation"]["kl"]
    assert {e["layer"]["codec"] for n, e in tuned["tensors"].items() if "_proj" in n} == {"vq/1"}
    taken = [b < a for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert any(taken)
    codes = [[p[2] for p in m["parts"] if p[0].endswith("/codes")] for m in (fitted, tuned)]
    assert codes[0] != codes[1] and len(codes[0]) == 14


def test_low_rank_repair(rig: dict[str, Path], tmp_path: Path) -> None:
    """Acceptance of LREC: of what two-bit rounding costs, a trained low-rank part brings back at least 70 %."""
    blind = made(rig, tmp_path / "a", "group", calib=False, bits=2, scale="l2")["evaluation"]
    repaired = made(rig, tmp_path / "b", "group", repair=8, bits=2)
    assert {e["layer"]["codec"] for n, e in repaired["tensors"].items() if "_proj" in n} == {"hybrid/1"}
    said = repaired["evaluation"]
    assert said["kl"] <= 0.3 * blind["kl"] and said["error"] <= 0.3 * blind["error"]
    assert said["agree"] >= blind["agree"] + 0.7 * (1 - blind["agree"]) - 0.01


def test_statistics_in_place_of_texts(rig: dict[str, Path], tmp_path: Path) -> None:
    assert not surgery(
        "statistics", rig["tuned"], "--kind", "gram", "--data", rig["texts.jsonl"], "-o", tmp_path / "g", "-q"
    ).returncode
    common = ["delta", "pack", "--base", rig["base"], "--model", rig["tuned"], "--codec", "round", "--bits", "1.5"]
    out = tmp_path / "p.delta.safetensors"
    found = surgery(*common, "-o", out, "--calib", tmp_path / "g", "--probe", rig["other.jsonl"])
    assert found.returncode == 0, found.stderr
    said = Package(str(out)).manifest.data
    blind = made(rig, tmp_path / "a", "round", calib=False, bits=1.5)
    assert said["calibration"]["fitted"] == {"round/1": 14} and said["calibration"]["texts"] == 48
    assert said["evaluation"]["error"] < 0.9 * blind["evaluation"]["error"]
    wrong = surgery(*common, "-o", tmp_path / "q", "--calib", tmp_path / "g", "--repair", "4")
    assert wrong.returncode == 2 and "--repair trains on texts" in wrong.stderr
    swapped = ["delta", "pack", "--base", rig["tuned"], "--model", rig["base"], "--codec", "group", "-o", tmp_path / "q"]
    wrong = surgery(*swapped, "--calib", tmp_path / "g")
    assert wrong.returncode == 2 and "was collected from other weights" in wrong.stderr


def harm_by_hand(rig: dict[str, Path], layer: str, texts: Any) -> float:
    """KL of predictions with one matrix coded with feedback at two bits, over n step^2 / 12. layer: its module."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(rig[n]).eval() for n in ("base", "tuned", "tuned")]
    rows: list[torch.Tensor] = []
    models[1].get_submodule(layer).register_forward_pre_hook(lambda m, x: rows.append(x[0][0]))
    with torch.no_grad():
        for ids in texts:
            models[1](input_ids=torch.tensor([ids]))
        x = torch.cat(rows).double().numpy()
        below, tuned, student = (m.get_submodule(layer).weight for m in models)
        delta = (tuned - below).numpy()
        coded = lossy_codec("dither").encode(delta, key=f"{layer}.weight", bits=2.0, inputs=Inputs(x.T @ x / len(x)))
        values = lossy_codec("dither").decode(coded, delta.shape, f"{layer}.weight", 0, delta.size).reshape(delta.shape)
        student.copy_(below + torch.from_numpy(values))
        kl = [torch.nn.functional.kl_div(*(m(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                                           for m in (models[2], models[1])), reduction="none", log_target=True).sum(-1)
              for ids in texts]  # fmt: skip
    return float(torch.cat(kl).mean()) / (delta.size * coded.facts["step"] ** 2 / 12)


def test_auto_spends_by_what_errors_do(rig: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices whose errors are seen in the outputs get more bits, and codes that can be fitted."""
    from surgery.delta import choices
    from surgery.delta.lossy import auto

    monkeypatch.setattr(auto, "_SMALL", 100)
    monkeypatch.setattr(auto, "_OVERHEAD", 0)
    base, tuned = (open_node(str(rig[n])) for n in ("base", "tuned"))
    with calibration(base, tuned, str(rig["texts.jsonl"])) as session:
        names = {n for n in session.deltas if ".layers." in n and len(session.deltas.shape(n)) == 2}
        factors = session.weights(names)
        layers = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj")
        expected = [harm_by_hand(rig, n, session.texts.fit) for n in layers]
        got = factors[f"{layers[0]}.weight"] / factors[f"{layers[1]}.weight"]
        assert got == pytest.approx(expected[0] / expected[1], rel=1e-3)
        plain, weighted = (
            choices.automatic(base, tuned, only=["*proj*"], bits=3.0, weights=w) for w in (None, session.weights)
        )
        from surgery.delta.manifest import Tensor

        bits = {}
        for name in names:
            tensor = Tensor(name, None, session.deltas.shape(name), "", ())  # type: ignore[arg-type]
            (one, a), (two, b) = plain(tensor), weighted(tensor)
            assert (one.name, two.name) == ("dither/1", "dither/1")
            bits[name] = b["bits"] - a["bits"]
    order = sorted(names, key=lambda n: factors[n])
    assert sum(bits[n] for n in order[:5]) < 0 < sum(bits[n] for n in order[-5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calib", "texts.jsonl"], "are for lossy packages"),
        (["--exact", "--probe", "texts.jsonl"], "are for lossy packages"),
        (["--bits", "1", "--repair", "4"], "--repair is trained on texts"),
        (["--max-error", "1e-3", "--codec", "dither", "--calib", "texts.jsonl"], "do not go together"),
        (["--bits", "1", "--calib", "nowhere"], "nowhere: no such file"),
        (["--bits", "1", "--calib", "base"], "neither a file of texts nor a statistics checkpoint"),
        (["--codec", "hybrid", "--calib", "texts.jsonl", "--repair", "4"], "hybrid/1 has some already"),
    ],
)
def test_refusals(rig: dict[str, Path], tmp_path: Path, options: list[str], message: str) -> None:
    out = tmp_path / "p.delta.safetensors"
    given = [str(rig[o]) if o in rig else o for o in options]
    found = surgery("delta", "pack", "--base", rig["base"], "--model", rig["tuned"], "-o", out, *given)
    assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())
