"""`surgery plan`, `run` and `edit` as users run them: kills, exit codes, and models that load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BF16,
    SURGERY,
    all_bytes,
    bits,
    config_of,
    llama,
    llama_config,
    llama_tensors,
    read_checkpoint,
    recipe,
    run,
    surgery,
    trio,
    write_checkpoint,
)

STEPS = """
da: {op: diff, of: [a, base]}
db: {op: diff, of: [b, base]}
t: {op: ties, of: [da, db], density: 0.3}
out: {op: add, of: [base, t], weight: 0.7}
"""
LINEAR = STEPS.replace("t: {op: ties, of: [da, db], density: 0.3}", "t: {op: add, of: [da, db]}")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 20 MB and an undisturbed run of a merge of them."""
    folder = tmp_path_factory.mktemp("big")
    trio(folder, hidden=512, vocab=2003, depth=10)
    path = recipe(folder, "out: {op: stock, of: [base, a, b]}", output="{from: out, shard_size: 4MB}")
    run(path, folder / "whole")
    return folder


def killed(folder: Path, out: Path, when: int, *options: str) -> int:
    """Start a run and kill it once its journal has `when` lines; returns how many it had, -1 if it was too fast."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    process = subprocess.Popen([*SURGERY, "run", str(folder / "recipe.yaml"), "-o", str(out), "--threads", "2", *options])
    while process.poll() is None:
        try:
            lines = journal.read_bytes().count(b"\n")
        except OSError:
            lines = -1
        if lines >= when:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return journal.read_bytes().count(b"\n") if journal.exists() else -1
        time.sleep(0.0005)
    return -1


@pytest.mark.parametrize("when", [0, 1, 6, 13])
def test_a_killed_run_goes_on_to_the_same_bytes(big: Path, tmp_path: Path, when: int) -> None:
    out = tmp_path / "out"
    had = killed(big, out, when)
    if had < 0:
        pytest.skip("the run was over before it could be killed")
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    refused = surgery("run", big / "recipe.yaml", "-o", out)
    if had > 0:
        assert refused.returncode == 2 and "--resume" in refused.stderr
        done = surgery("run", big / "recipe.yaml", "-o", out, "--resume", "--threads", "1")
        assert done.returncode == 0, done.stderr
    assert all_bytes(out) == all_bytes(big / "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_again_and_again(big: Path, tmp_path: Path) -> None:
    out, had = tmp_path / "out", killed(big, tmp_path / "out", 3)
    for _ in range(2):
        if had < 0:
            break
        had = killed(big, out, had + 5, "--resume")
    if not out.exists():
        assert surgery("run", big / "recipe.yaml", "-o", out, "--resume").returncode == 0
    assert all_bytes(out) == all_bytes(big / "whole")


def test_resume_computes_only_what_is_left(big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.checkpoint.writer import Writer

    if killed(big, tmp_path / "out", 8) < 0:
        pytest.skip("the run was over before it could be killed")
    written = set()
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, name, *rest: (written.add(name), write(self, name, *rest))[1])
    run(big / "recipe.yaml", tmp_path / "out", resume=True)
    assert 0 < len(written) <= len(read_checkpoint(tmp_path / "out")) - 7
    assert all_bytes(tmp_path / "out") == all_bytes(big / "whole")


def test_resume_of_another_plan_is_refused(big: Path, tmp_path: Path) -> None:
    if killed(big, tmp_path / "out", 2) < 0:
        pytest.skip("the run was over before it could be killed")
    before = sorted(p.name for p in (tmp_path / "out.partial").iterdir())
    done = surgery("run", big / "recipe.yaml", "-o", tmp_path / "out", "--resume", "--set", "output.precision=float64")
    assert done.returncode == 2 and "another plan" in done.stderr and "--overwrite" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == before
    done = surgery("run", big / "recipe.yaml", "-o", tmp_path / "out", "--overwrite")
    assert done.returncode == 0 and all_bytes(tmp_path / "out") == all_bytes(big / "whole")


def test_interrupting_says_how_to_go_on(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*SURGERY, "run", str(big / "recipe.yaml"), "-o", str(out), "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (tmp_path / "out.partial" / "journal.jsonl").exists():
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if process.returncode == 0:
        pytest.skip("the run was over before it could be interrupted")
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert surgery("run", big / "recipe.yaml", "-o", out, "--resume").returncode == 0
    assert all_bytes(out) == all_bytes(big / "whole")


def test_two_runs_at_once_make_one_output(big: Path, tmp_path: Path) -> None:
    command = [*SURGERY, "run", str(big / "recipe.yaml"), "-o", str(tmp_path / "out"), "-q"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in both]
    codes = sorted(p.returncode for p in both)
    assert codes == [0, 2], said
    assert all_bytes(tmp_path / "out") == all_bytes(big / "whole")


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, LINEAR)
    done = surgery("plan", path)
    assert done.returncode == 0 and done.stdout.startswith("WRITE 1 file, 12 tensors") and done.stderr == ""
    done = surgery("plan", path, "--json", "--set", "output.dtype=float32", "--set", "output.shard_size=1000")
    data = json.loads(done.stdout)
    assert {t["dtype"] for t in data["output"]["tensors"]} == {"float32"} and len(data["output"]["files"]) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "recipe.yaml"]


def test_run_on_the_command_line(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, LINEAR)
    done = surgery("run", "recipe.yaml", "-o", "out", "--set", "steps.out.weight=0", "--profile", cwd=tmp_path)
    assert done.returncode == 0 and "out: 12 tensors" in done.stderr and done.stdout == ""
    assert "GB/s" in done.stderr
    for name, value in read_checkpoint(tmp_path / "out").items():
        assert bits(value) == bits(llama_tensors(0)[name])
    assert (tmp_path / "out" / "surgery.yaml").read_text() == "# --set steps.out.weight=0\n" + path.read_text()
    done = surgery("run", path, "-o", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--overwrite" in done.stderr
    quiet = surgery("run", path, "-o", tmp_path / "out", "--overwrite", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_edit_on_the_command_line(tmp_path: Path) -> None:
    llama(tmp_path / "a", 0)
    script = tmp_path / "script.py"
    script.write_text("def edit(checkpoint):\n    return checkpoint.layers[1:].cast('float32', '*mlp*')\n")
    shown = surgery("edit", script, tmp_path / "a", "-o", tmp_path / "out", "--dry-run")
    assert shown.returncode == 0 and "CAST" in shown.stdout and not (tmp_path / "out").exists()
    done = surgery("edit", script, tmp_path / "a", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2 and len(read_checkpoint(tmp_path / "out")) == 9
    for content, said in (("x = 1", "defines no function edit"), ("def edit(c): return 3", "returned int"), ("1/0", "ZeroDiv")):
        script.write_text(content)
        done = surgery("edit", script, tmp_path / "a", "-o", tmp_path / "new")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean `run`?"),
        (["run"], "RECIPE"),
        (["run", "nothing.yaml", "-o", "x"], "cannot be read"),
        (["run", "recipe.yaml"], "--out"),
        (["run", "recipe.yaml", "-o", "x", "--threads", "0"], "threads"),
        (["run", "recipe.yaml", "-o", "x", "--memory", "lots"], "not a size"),
        (["plan", "recipe.yaml", "--set", "x"], "KEY=VALUE"),
        (["ops", "tise"], "did you mean `ties`?"),
    ],
)
def test_wrong_usage_is_code_2_without_a_traceback(tmp_path: Path, arguments: list[str], said: str) -> None:
    trio(tmp_path)
    recipe(tmp_path, LINEAR)
    done = surgery(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "recipe.yaml"]


def test_peak_memory_stays_below_what_was_promised(big: Path, tmp_path: Path) -> None:
    """The process's own peak, measured by the kernel."""
    (tmp_path / "recipe.yaml").write_text(
        (big / "recipe.yaml").read_text().replace(": base\n", f": {big}/base\n").replace(": a\n", f": {big}/a\n")
        .replace(": b\n", f": {big}/b\n")
    )  # fmt: skip
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    path = str(tmp_path / "recipe.yaml")
    promised = json.loads(surgery("plan", path, "--json").stdout)["cost"]["peak_memory"]
    command = [*SURGERY, "run", path, "-o", str(tmp_path / "out"), "-q", "--memory", str(promised)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= promised * 1.1


# -- what transformers makes of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_llama_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    import torch
    import transformers

    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=71,
            tie_word_embeddings=tied, attention_bias=True,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    path = recipe(tmp_path, STEPS, output="{from: out, dtype: float16, shard_size: 5kB}")
    done = surgery("run", path, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto", local_files_only=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.dtype is torch.float16 and model.config.dtype is torch.float16
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    assert model.config.tie_word_embeddings is tied
    with torch.no_grad():
        assert torch.isfinite(model.float()(torch.arange(10)[None]).logits).all()
    written = read_checkpoint(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if name in written:
            np.testing.assert_array_equal(tensor.numpy(), written[name].astype(np.float32))


def test_stacked_layers_load_in_transformers(tmp_path: Path) -> None:
    """A frankenmerge by script: five blocks of three."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=71
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    (tmp_path / "s.py").write_text("def edit(c):\n    return c.layers[[0, 1, 1, 2, 2]]\n")
    done = surgery("edit", tmp_path / "s.py", tmp_path / "a", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_a_bfloat16_folder_of_ours_is_what_config_says(tmp_path: Path) -> None:
    """config's old key `torch_dtype` does not survive with another truth beside it."""
    for seed, name in enumerate("ab"):
        config = llama_config(torch_dtype="float32")
        del config["dtype"]
        write_checkpoint(tmp_path / name, llama_tensors(seed), config=config)
    run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert {config[k] for k in ("dtype", "torch_dtype") if k in config} == {"bfloat16"}
    assert all(v.dtype == BF16 for v in read_checkpoint(tmp_path / "out").values())
    assert os.path.exists(tmp_path / "out" / "README.md")
