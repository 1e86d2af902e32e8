"""`surgery eval` and `surgery sweep` as they are called."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SURGERY, surgery

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
from lab_rig import build_rig, classifier, jsonl

MERGE = """models: {base: base, rot90: rot90, inv: inv}
steps:
  a: {op: diff, of: [rot90, base]}
  b: {op: diff, of: [inv, base]}
  t: {op: ties, of: [a, b], density: 0.4}
  merged: {op: add, of: [base, t], weight: 0.4}
output: {from: merged, dtype: bfloat16}
"""
GRID = """recipe: merge.yaml
tasks: tasks.yaml
dimensions: {steps.merged.weight: {low: 0.0, high: 1.0, points: 30}}
objective: {rot90: accuracy, inv: accuracy}
"""
MODULE = ("--module", "net.py:build")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_rig(tmp_path_factory.mktemp("lab") / "rig")
    (folder / "merge.yaml").write_text(MERGE)
    (folder / "grid.yaml").write_text(GRID)
    return folder


def called(*args: object, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> int:
    """The command line in this process; its exit code."""
    from surgery.cli import main

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_a_recipe_is_what_it_writes(work: Path) -> None:
    shown = surgery(
        "eval", "merge.yaml", "--tasks", "tasks.yaml", *MODULE, "--json", "--set", "steps.merged.weight=0.7", cwd=work
    )
    assert shown.returncode == 0, shown.stderr
    done = surgery("run", "merge.yaml", "-o", "written", "--set", "steps.merged.weight=0.7", cwd=work)
    assert done.returncode == 0, done.stderr
    written = surgery("eval", "written", "--tasks", "tasks.yaml", *MODULE, "--json", cwd=work)
    a, b = (json.loads(x.stdout)["models"][0]["tasks"] for x in (shown, written))
    assert a == b and set(a) == {"clean", "rot90", "inv"}
    assert a["inv"]["measures"]["accuracy"]["value"] > 0.8


def test_a_killed_sweep_resumes(work: Path) -> None:
    sweep = [*SURGERY, "sweep", "grid.yaml", "-o", "found", *MODULE, "--resamples", "50"]
    process = subprocess.Popen([*sweep, "-q"], cwd=work)
    journal = work / "found" / "trials.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = journal.read_text().splitlines()
    assert 2 <= len(before) < 30 and not (work / "found" / "results.json").exists()
    again = subprocess.run([*sweep, "--resume"], cwd=work, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert journal.read_text().splitlines()[: len(before) - 1] == before[:-1]
    assert "30 trials by grid; trial " in again.stdout and "trial 30 of 30" in again.stderr
    told = json.loads((work / "found" / "results.json").read_text())
    assert told["trials_made"] == 30 and [t["number"] for t in told["trials"]] == list(range(1, 31))
    assert len({t["params"]["steps.merged.weight"] for t in told["trials"]}) == 30
    assert not any(p.suffix == ".safetensors" for p in (work / "found").rglob("*"))


def test_tables_and_stages(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "two.yaml").write_text("".join(line for line in (work / "tasks.yaml").open() if "clean" not in line))
    args = ["eval", "base", "rot90", "inv", "--tasks", "two.yaml", "--stages", "--ensemble", "--reference", "base", *MODULE]
    assert called(*args, "--resamples", 50, monkeypatch=monkeypatch, cwd=work) == 0
    shown = capsys.readouterr().out
    for line in ("rot90 (test, n=497)", "accuracy - reference", "ensemble", "forgetting", "backward transfer", "95%"):
        assert line in shown, shown


def test_what_is_wrong_is_said_in_one_line(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier(tmp_path / "c", ["no", "yes"])
    jsonl(tmp_path / "ok.jsonl", [{"text": "good", "label": "yes"}])
    jsonl(tmp_path / "unknown.jsonl", [{"text": "good", "label": "perhaps"}])
    (tmp_path / "empty.csv").write_text("text,label\n")
    capsys.readouterr()  # what making the models has printed
    lines = "\n".join(
        f"  {name}: {{kind: classification, test: {file}{more}}}"
    for name, file, more in (
            ("column", "ok.jsonl", ", text: body"), ("unknown", "unknown.jsonl", ""), ("empty", "empty.csv", ""),
            ("gone", "gone.csv", ""),
        )
    )  # fmt: skip
    for number, (name, problem) in enumerate(
        [
            ("column", "ok.jsonl: there is no column `body`"),
            ("unknown", "unknown.jsonl: row 1: the model knows no label 'perhaps'"),
            ("empty", "empty.csv: the split is empty"),
            ("gone", "gone.csv: there is no such file"),
        ]
    ):
        (tmp_path / "tasks.yaml").write_text("tasks:\n" + lines.splitlines()[number] + "\n")
        assert called("eval", "c", "--tasks", "tasks.yaml", monkeypatch=monkeypatch, cwd=tmp_path) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and problem in error and "Traceback" not in error
    (tmp_path / "tasks.yaml").write_text("tasks:\n  a: {kind: classification, test: ok.jsonl}\n")
    for args, problem in (
        (["eval", "c", "--tasks", "tasks.yaml", "--split", "validation"], "has no validation split"),
        (["eval", "c", "--tasks", "tasks.yaml", "--device", "cuda:9"], "not to be had here"),
        (["eval", "c", "--tasks", "tasks.yaml", "--set", "a=1"], "--set changes recipes"),
        (["eval", "c", "--tasks", "tasks.yaml", "--ensemble"], "--ensemble averages two models or more"),
        (["eval", "c", "--tasks", "tasks.yaml", "--module", "x.py"], "expected FILE.py:FUNCTION"),
        (["eval", "c", "--tasks", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["sweep", "tasks.yaml"], "unknown key `tasks`|cannot be"),
    ):
        assert called(*args, monkeypatch=monkeypatch, cwd=tmp_path) == 2, args
        error = capsys.readouterr().err
        assert any(p in error for p in problem.split("|")) and "Traceback" not in error, (args, error)
