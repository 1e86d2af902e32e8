"""Tasks of lm-evaluation-harness on live models: against likelihoods by hand and against the harness's own numbers."""

from pathlib import Path

import numpy as np
import pytest
from lab_rig import jsonl, language_model

pytest.importorskip("lm_eval")

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Settings
from surgery.lab.evaluation import Evaluator
from surgery.lab.harness import _summands, tasks_of

HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: a
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1}
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
GENERATE = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[a]}}"
generation_kwargs: {until: ["film"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
FAST = Settings(resamples=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    made = tmp_path_factory.mktemp("harness")
    for i, name in enumerate(("one", "two")):
        language_model(made / name, seed=i)
        tokenizer = AutoTokenizer.from_pretrained(made / name)
        tokenizer.eos_token = "[PAD]"
        tokenizer.save_pretrained(made / name)
    rows = [
        ("the film was", ["good", "bad"], 0),
        ("Anna saw", ["Rome", "plot"], 1),
        ("the plot", ["was", "in"], 0),
        ("not a", ["bad", "film"], 0),
    ]
    jsonl(made / "d.jsonl", [{"q": q, "choices": c, "a": a} for q, c, a in rows] * 2)
    for name, text in (("mc", CHOICE), ("rolling", ROLLING), ("gen", GENERATE)):
        (made / f"{name}.yaml").write_text(HEAD.format(name=f"film_{name}", data=made / "d.jsonl") + text)
    (made / "up.yaml").write_text("ensemble: {kind: emulated, large: one, tuned: two, base: one}\n")
    return made


def task(folder: Path, name: str, **more: object) -> lab.Task:
    return lab.make_task(name, {"kind": "lm-eval", "task": f"{name}.yaml", **more}, folder=folder)


def test_multiple_choice_is_what_our_own_choice_finds(folder: Path) -> None:
    jsonl(folder / "ours.jsonl", [{"prompt": "the film was", "choices": ["good", "bad"], "answer": 0}, {"prompt": "Anna saw", "choices": ["Rome", "plot"], "answer": 1},
                                  {"prompt": "the plot", "choices": ["was", "in"], "answer": 0}, {"prompt": "not a", "choices": ["bad", "film"], "answer": 0}] * 2)  # fmt: skip
    ours = lab.make_task("c", {"kind": "choice", "test": "ours.jsonl"}, folder=folder)
    for model in (folder / "one", folder / "two", folder / "up.yaml"):
        found = lab.evaluate(model, task(folder, "mc"), settings=FAST)["mc"]
        assert found["acc"].value == lab.evaluate(model, ours, settings=FAST)["c"]["accuracy"].value
        assert found["acc"].units == 8 and found["acc"].low <= found["acc"].value <= found["acc"].high


def test_a_recipe_beside_the_harness_on_the_written_model(folder: Path) -> None:
    """The live merge gives what the harness finds for the checkpoint that `run` writes; F1 is resampled as a whole."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import surgery

    merged = surgery.ops.lerp(surgery.open(folder / "one"), surgery.open(folder / "two"), alpha=0.4)
    merged.save(folder / "merged")
    found = lab.evaluate(merged, [task(folder, "mc"), task(folder, "rolling")], settings=FAST)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = HFLM(pretrained=str(folder / "merged"), device="cpu", batch_size=2)
    theirs = simple_evaluate(model, tasks=["film_mc", "film_rolling"], task_manager=manager, bootstrap_iters=0)["results"]
    assert found["mc"]["acc"].value == theirs["film_mc"]["acc,none"] and found["mc"]["f1"].value == pytest.approx(
        theirs["film_mc"]["f1,none"]
    )
    assert found["rolling"]["word_perplexity"].value == pytest.approx(theirs["film_rolling"]["word_perplexity,none"], rel=1e-4)
    assert found["rolling"]["bits_per_byte"].value == pytest.approx(theirs["film_rolling"]["bits_per_byte,none"], rel=1e-4)
    assert np.isfinite(found["mc"]["f1"].low)


def test_generation_and_splits(folder: Path) -> None:
    given = task(folder, "gen", validation="0:3", test="3:")
    found = lab.evaluate(folder / "up.yaml", given, settings=FAST)["gen"]["exact_match"]
    assert found.units == 5 and 0 <= found.value <= 1
    assert lab.evaluate(folder / "one", given, split="validation", settings=FAST)["gen"]["exact_match"].units == 3
    assert given.splits == ["validation", "test"] and task(folder, "gen").splits == ["test"]
    assert given.measure("exact_match").better == "high" and task(folder, "rolling").measure("bits_per_byte").better == "low"


def test_two_models_after_another_do_not_share_answers(folder: Path) -> None:
    one = task(folder, "rolling")
    values = [lab.evaluate(folder / n, one, settings=FAST)["rolling"]["bits_per_byte"].value for n in ("one", "two", "one")]
    assert values[0] == values[2] != values[1]
    difference = lab.evaluate(folder / "two", one, reference=folder / "one", settings=FAST)
    assert difference.results["rolling"].difference["bits_per_byte"].value == pytest.approx(values[1] - values[0])


def test_any_aggregation_is_resampled_by_the_harness_itself() -> None:
    def spread(items):
        return max(items) - min(items)

    features, finish = _summands([1.0, 4.0, 2.0], spread, "spread")
    assert finish(features.sum(axis=0, keepdims=True))[0] == 3.0
    assert finish(np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])).tolist() == [1.0, 0.0]
    with pytest.raises(Refused, match="too many to resample"):
        _summands([1.0] * 6000, spread, "spread")


@pytest.mark.parametrize(
    "said, problem",
    [
        ({}, "needs `task`"),
        ({"task": "nothing.yaml"}, "there is no such task file"),
        ({"task": "d.yaml"}, "names no `task` or `group`"),
        ({"task": "mc.yaml", "test": "5"}, "`test` is a range of the task's examples"),
        ({"task": "mc.yaml", "test": "90:"}, "the test split is empty: `film_mc` has 8 examples"),
        ({"task": "mc.yaml", "measures": ["accuracy"]}, "cannot give `accuracy`\nhint: known: acc, f1"),
        ({"task": "mc.yaml", "shots": -1}, "`shots` cannot be negative"),
        ({"task": "broken.yaml"}, "task `broken` cannot be loaded"),
    ],
)
def test_what_is_refused(folder: Path, said: dict, problem: str) -> None:
    (folder / "d.yaml").write_text("x: 1\n")
    (folder / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n"
    )
    with pytest.raises(Refused, match=problem):
        lab.evaluate(folder / "one", lab.make_task("t", {"kind": "lm-eval", **said}, folder=folder))


def test_names_that_the_harness_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:  # the real one indexes thousands of files, for seconds
        all_tasks = ("hellaswag", "mmlu")

        def __init__(self, **options: object) -> None:
            assert options == {"include_path": None, "include_defaults": True}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    (one,) = tasks_of(["helaswag"])
    with pytest.raises(Refused, match="the harness has no task `helaswag`\nhint: did you mean `hellaswag`"):
        Evaluator(one).outcomes(folder / "one", {"helaswag": "test"})


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(Refused, match="need lm-evaluation-harness\nhint: pip install"):
        lab.evaluate(folder / "one", task(folder, "mc"))


def test_models_and_tokenizers_that_cannot(folder: Path, tmp_path: Path) -> None:
    from lab_rig import classifier

    with pytest.raises(Refused, match="which is no causal language model"):
        lab.evaluate(classifier(tmp_path / "c", ["no", "yes"]), task(folder, "mc"))
    language_model(tmp_path / "lm")
    with pytest.raises(Refused, match="no token that ends a text"):
        lab.evaluate(tmp_path / "lm", task(folder, "gen"))
