"""`surgery tune` as a user runs it: what comes out loads, applies and merges; a killed run goes on; bad input costs one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import SURGERY
from safetensors.torch import load_file

from surgery.cli import main

WORDS = ["[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "in"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (a bfloat16 llama), train.csv, text.txt, and two tune files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder / "base")
    draw = random.Random(3)
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS[1:]) for _ in range(400)))
    rows = [f"{draw.choice(['cat sat', 'the mat'] if i % 2 else ['dog ran', 'in a'])},{i % 2}" for i in range(20)]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    common = "epochs: 2\nlr: 0.02\nbatch: 4\n"
    (folder / "lm.yaml").write_text(f"model: base\ntask: {{kind: causal, train: text.txt, length: 20}}\nmethod: half\n{common}")
    (folder / "class.yaml").write_text(
        f"model: base\ntask: {{kind: classification, train: train.csv, validation: train.csv}}\n{common}"
    )
    return folder


@dataclass
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def surgery(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process (a fresh one spends seconds on importing torch), started in `home`."""
    monkeypatch.chdir(home)

    def run(*args: str, expect: int = 0) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["surgery", *args])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
        said = capsys.readouterr()
        assert code == expect, said.err
        return Done(said.out, said.err)

    return run


def test_checkpoint_and_delta_are_the_same_model(home: Path, surgery: Any) -> None:
    done = surgery("tune", "lm.yaml", "-o", "half", "--json")
    said = json.loads(done.stdout)
    assert said["entries"] < said["of"] and "parameters trained" in done.stderr and "step 10 of 10" in done.stderr
    base, half = load_file(home / "base/model.safetensors"), load_file(home / "half/model.safetensors")
    assert set(base) == set(half) and all(half[n].dtype == torch.bfloat16 for n in half)
    same = {n for n in base if torch.equal(base[n], half[n])}
    assert 0 < len(same) < len(base)
    config = json.loads((home / "half/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert (home / "half/tokenizer.json").read_bytes() == (home / "base/tokenizer.json").read_bytes()

    surgery("tune", "lm.yaml", "-o", "half.delta.safetensors", "--set", "output=delta", "-q")
    surgery("delta", "apply", "half.delta.safetensors", "--base", "base", "-o", "rebuilt", "-q")
    for name in ("model.safetensors", "config.json", "tune.json", "tokenizer.json"):
        assert (home / "rebuilt" / name).read_bytes() == (home / "half" / name).read_bytes(), name
    shown = json.loads(surgery("delta", "inspect", "half.delta.safetensors", "--json").stdout)
    assert {t["name"] for t in shown["tensors"] if t["codec"] == "same"} == same
    assert not list(home.glob("*.partial"))


def test_adapter_loads_in_peft_and_onto_its_base(home: Path, surgery: Any) -> None:
    import peft

    method = "method={lora: {r: 4, target_modules: [v_proj, q_proj]}}"
    surgery("tune", "lm.yaml", "-o", "adapter", "-q", "--set", method)
    surgery("tune", "lm.yaml", "-o", "merged", "-q", "--set", method, "--set", "output=checkpoint")
    config = json.loads((home / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "base")
    assert config["target_modules"] == ["q_proj", "v_proj"]  # sorted: peft's set has another order in every process
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(model, home / "adapter").merge_and_unload().state_dict()
    merged = load_file(home / "merged/model.safetensors")
    base = load_file(home / "base/model.safetensors")
    for name, value in merged.items():
        assert torch.equal(value, whole[name].to(torch.bfloat16)), name
        assert torch.equal(value, base[name]) == (not name.endswith(("q_proj.weight", "v_proj.weight"))), name
    surgery("lora", "apply", "base", "adapter", "-o", "applied", "-q")
    for name, value in load_file(home / "applied/model.safetensors").items():
        torch.testing.assert_close(value, merged[name], rtol=2**-7, atol=1e-6)


def test_classifier_predicts_what_it_learnt(home: Path, surgery: Any) -> None:
    done = surgery("tune", "class.yaml", "-o", "classifier", "--set", "epochs=6", "--set", "average={ema: {decay: 0.5}}")
    assert "validation accuracy 1" in done.stderr and "new, drawn with the seed: score.weight" in done.stderr
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "classifier")
    words = transformers.AutoTokenizer.from_pretrained(home / "classifier")
    logits = model(**words("cat sat", return_tensors="pt", return_token_type_ids=False)).logits
    assert model.config.id2label[int(logits.argmax())] == "1"


def test_a_killed_run_goes_on(home: Path, surgery: Any) -> None:
    args = ["tune", "lm.yaml", "--set", "epochs=8", "--set", "save_every=3", "--set", "regularise={neftune: 5}", "-q"]
    surgery(*args, "-o", "steady")
    running = subprocess.Popen([*SURGERY, *args, "-o", "killed"], cwd=home, env=ENV, stderr=subprocess.DEVNULL)
    states = home / "killed.partial" / ".training"
    while running.poll() is None and len(list(states.glob("checkpoint-*/complete"))) < 2:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (home / "killed").exists()
    assert "--resume goes on with it" in surgery(*args, "-o", "killed", expect=2).stderr
    surgery(*args, "-o", "killed", "--resume")
    for path in (home / "steady").iterdir():
        assert path.read_bytes() == (home / "killed" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["none.yaml"], "cannot be read"),
        (["lm.yaml", "--set", "metod=half"], "unknown key `metod` in the tune file\nhint: did you mean `method`?"),
        (["lm.yaml", "--set", "method=haf"], "lm.yaml:3:1: there is no method `haf`\nhint: did you mean `half`?"),
        (["lm.yaml", "--set", "model=nowhere"], "nowhere"),
        (["lm.yaml", "--set", "task.train=nowhere.txt"], "nowhere.txt: there is no such file"),
        (["class.yaml", "--set", "task.label=lable"], "there is no column `lable`\nhint: did you mean `label`?"),
        (["lm.yaml", "--set", "optimizer=adamm"], "transformers has no `adamm`"),
        (["lm.yaml", "--set", "method={lora: {rank: 3}}"], "LoraConfig has no `rank`"),
        (["lm.yaml", "--set", "method={lora: {target_modules: [nope]}}"], "nope"),
        (["lm.yaml", "--set", "output=delta"], "a delta package is a file"),
        pytest.param(["lm.yaml", "--set", "device=cuda"], "torch finds no CUDA device",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(home: Path, surgery: Any, args: list[str], what: str) -> None:
    done = surgery("tune", *args, "-o", "bad", expect=2)
    assert what in done.stderr and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert not (home / "bad").exists() and not (home / "bad.partial").exists()


def test_a_diverging_run_stops_and_keeps_the_last_good_state(home: Path, surgery: Any) -> None:
    done = surgery("tune", "lm.yaml", "-o", "wild", "-q", "--set", "lr=1e30", "--set", "regularise={clip: 0}", expect=1)
    assert "error: stopped at step" in done.stderr and "Traceback" not in done.stderr
    kept = load_file(home / "wild.partial/last-good/model.safetensors")
    assert all(bool(t.isfinite().all()) for t in kept.values())
