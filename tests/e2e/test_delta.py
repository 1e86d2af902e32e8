"""`surgery delta` as users run it: pack, inspect, verify, apply, compose; what it prints and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import BF16, SURGERY, all_bytes, flip_bit, llama_config, read_checkpoint, surgery, tokens, write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "delta"))
from packing import pair, tuned_from


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pair(folder)
    done = surgery("delta", "pack", "--base", "base", "--model", "tuned", "-o", "tuned.delta.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "12 coded" in done.stderr and "x)" in done.stderr
    return folder


def test_apply_gives_the_files_back(models, tmp_path):
    done = surgery("delta", "apply", "tuned.delta.safetensors", "--base", "base", "-o", tmp_path / "out", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "every hash right" in done.stderr and done.stdout == ""
    assert all_bytes(tmp_path / "out") == all_bytes(models / "tuned")


def test_inspect(models):
    done = surgery("delta", "inspect", "tuned.delta.safetensors", "--tensors", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "ulp-ctx-zstd/1" in done.stdout and "model.layers.1.mlp.up_proj.weight" in done.stdout
    view = json.loads(surgery("delta", "inspect", "tuned.delta.safetensors", "--json", cwd=models).stdout)
    package = models / "tuned.delta.safetensors"
    assert view["bytes"] == package.stat().st_size and view["mode"] == "exact"
    assert view["ratio"] == pytest.approx(view["model_bytes"] / view["bytes"])
    assert sum(layer["bytes"] for layer in view["layers"].values()) == view["total"]["bytes"] < view["bytes"]


def test_verify(models, tmp_path):
    done = surgery("delta", "verify", "tuned.delta.safetensors", cwd=models)
    assert done.returncode == 0 and "whole" in done.stderr
    done = surgery("delta", "verify", "tuned.delta.safetensors", "--base", "base", cwd=models)
    assert done.returncode == 0 and "as they were packed" in done.stderr
    done = surgery("delta", "verify", "tuned.delta.safetensors", "--base", "tuned", cwd=models)
    assert done.returncode == 2 and "not the base" in done.stderr and "Traceback" not in done.stderr
    broken = tmp_path / "b.delta.safetensors"
    broken.write_bytes((models / "tuned.delta.safetensors").read_bytes())
    flip_bit(broken, 9000)
    done = surgery("delta", "verify", broken, cwd=models)
    assert done.returncode == 2 and done.stderr.startswith("error:") and "damaged" in done.stderr


def test_a_wrong_base_leaves_nothing(models, tmp_path):
    done = surgery("delta", "apply", "tuned.delta.safetensors", "--base", "tuned", "-o", tmp_path / "out", cwd=models)
    assert done.returncode == 2 and "not the base" in done.stderr
    assert os.listdir(tmp_path) == []


def test_compose_needs_no_model_between(models, tmp_path):
    later = tuned_from(read_checkpoint(models / "tuned"), 7)
    write_checkpoint(tmp_path / "later", later, config=llama_config(), vocab=tokens(130))
    two = tmp_path / "two.delta.safetensors"
    assert surgery("delta", "pack", "--base", models / "tuned", "--model", tmp_path / "later", "-o", two).returncode == 0
    both = tmp_path / "both.delta.safetensors"
    command = ["delta", "compose", models / "tuned.delta.safetensors", two, "--base", models / "base", "-o", both]
    done = surgery(*command)
    assert done.returncode == 0, done.stderr
    done = surgery("delta", "apply", both, "--base", models / "base", "-o", tmp_path / "out", "-q")
    assert done.returncode == 0 and done.stderr == ""
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "later")
    done = surgery("delta", "compose", two, models / "tuned.delta.safetensors", "--base", models / "base", "-o", both, "--overwrite")
    assert done.returncode == 2 and "not the base" in done.stderr


def test_fast_exact_packages(models, tmp_path):
    fast = tmp_path / "f.delta.safetensors"
    assert surgery("delta", "pack", "--base", "base", "--model", "tuned", "--fast", "-o", fast, cwd=models).returncode == 0
    assert surgery("delta", "apply", fast, "--base", "base", "-o", tmp_path / "out", cwd=models).returncode == 0
    assert all_bytes(tmp_path / "out") == all_bytes(models / "tuned")


@pytest.mark.parametrize(
    "how",
    [
        ["--bits", "1.5", "--codec", "dither"],
        ["--max-error", "2e-4", "--codec", "dither"],
        ["--size", "30kB"],
        ["--codec", "sign"],
    ],
)
def test_lossy_packages(models, tmp_path, how):
    out = tmp_path / "l.delta.safetensors"
    done = surgery("delta", "pack", "--base", "base", "--model", "tuned", "-o", out, *how, cwd=models)
    if how[0] == "--size":  # 12,000 parameters in blocks: too little for a budget to be shared out, or enough
        assert done.returncode in (0, 2), done.stderr
        if done.returncode:
            assert "budget" in done.stderr and not out.exists()
            return
    assert done.returncode == 0, done.stderr
    view = json.loads(surgery("delta", "inspect", out, "--json").stdout)
    assert view["mode"] == "lossy"
    assert surgery("delta", "verify", out, "--base", models / "base").returncode == 0
    if how[0] == "--max-error":
        assert all(t["error"]["bound"] <= 2e-4 for t in view["tensors"] if t["error"])


def test_the_schema_is_printed():
    done = surgery("delta", "schema")
    assert json.loads(done.stdout)["properties"]["spec"] == {"enum": [1, 2]}


def test_codecs_are_listed(models):
    done = surgery("delta", "pack", "--base", "x", "--model", "y", "-o", "z", "--codec", "list")
    assert done.returncode == 0 and "dither/1" in done.stdout and "max_error" in done.stdout


@pytest.mark.parametrize(
    "options,words",
    [
        (["--exact", "--bits", "1"], ["--exact"]),
        (["--bits", "1", "--max-error", "1"], ["--bits", "--max-error"]),
        (["--codec", "zip"], ["zip"]),
        (["--codec", "dither", "--set", "stepp=1"], ["stepp", "step"]),
        (["--bits", "1", "--only", "nothing*"], ["nothing*"]),
        (["--codec", "dither", "--size", "1MB"], ["--size"]),
        (["--set", "x"], ["--exact"]),
        (["--threads", "0"], ["--threads"]),
    ],
)
def test_options_that_make_no_sense(models, tmp_path, options, words):
    done = surgery("delta", "pack", "--base", "base", "--model", "tuned", "-o", tmp_path / "o.safetensors", *options, cwd=models)
    assert done.returncode == 2, done.stderr
    assert all(w in done.stderr for w in words) and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_killed_run_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"w{i}": rng.standard_normal((1024, 512)).astype(BF16) for i in range(12)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned_from(base))
    assert surgery("delta", "pack", "--base", "base", "--model", "tuned", "-o", "p.delta.safetensors", cwd=tmp_path).returncode == 0
    command = ["delta", "apply", "p.delta.safetensors", "--base", "base", "-o", "out", "--threads", "1"]
    running = subprocess.Popen([*SURGERY, *command], cwd=tmp_path, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    for _ in range(4000):
        if running.poll() is not None or (journal.exists() and journal.read_text().count("\n") >= 3):
            break
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    if not (tmp_path / "out").exists():  # else it was quicker than the signal
        done = surgery(*command, cwd=tmp_path)
        assert done.returncode == 2 and "--resume" in done.stderr
        done = surgery(*command, "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "there already" in done.stderr
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "tuned")


def test_packages_in_recipes(models, tmp_path):
    (tmp_path / "r.yaml").write_text(f"""models:
  base: {models / "base"}
  tuned: {{source: {models / "tuned.delta.safetensors"}, base: base}}
steps:
  soup: {{op: average, of: [base, tuned]}}
output: {{from: soup}}
""")
    done = surgery("run", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found, b, t = (read_checkpoint(p) for p in (tmp_path / "out", models / "base", models / "tuned"))
    for name, value in found.items():
        exact = (b[name].astype(np.float64) + t[name].astype(np.float64)) / 2
        assert np.array_equal(value, exact.astype(BF16)), name
