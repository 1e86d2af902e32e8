"""Tasks: what every kind makes of a model, against transformers and torch used by hand; and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_rig import Net, classifier, jsonl, language_model, write, write_tokenizer
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForSequenceClassification, BertForTokenClassification, BertModel, LlamaForCausalLM

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.evaluation import Evaluator
from surgery.lab.table import read_table

TEXTS = ["good film", "bad film", "the plot was very good", "not a good film", "bad bad plot", "was the film in Rome"]
LABELS = ["yes", "no", "yes", "no", "no", "yes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    classifier(folder / "c", ["no", "yes"])
    classifier(folder / "t", ["O", "B-P", "I-P"], tokens=True)
    language_model(folder / "lm")
    rows = [{"text": t, "label": lab} for t, lab in zip(TEXTS, LABELS, strict=True)]
    jsonl(folder / "c.jsonl", rows)
    (folder / "c.csv").write_text("label,text\n" + "".join(f'{lab},"{t}"\n' for t, lab in zip(TEXTS, LABELS, strict=True)))
    jsonl(folder / "t.jsonl", [
        {"tokens": ["Anna", "saw", "Rome"], "labels": ["B-P", "O", "O"]}, {"tokens": ["the", "film"], "labels": ["O", "O"]},
    ])  # fmt: skip
    jsonl(folder / "ch.jsonl", [
        {"prompt": "the film was", "choices": ["good", "very bad"], "answer": 0},
        {"prompt": "Anna saw", "choices": ["Rome", "a plot", "not"], "answer": "a plot"},
    ])  # fmt: skip
    (folder / "text.txt").write_text(" ".join(TEXTS) * 4)
    return folder


def outcome(folder: Path, model: object, split: str = "test", **said: object):
    task = lab.make_task("t", said, folder=folder)
    return Evaluator(task).outcomes(model, {"t": split})["t", split]


@torch.inference_mode()
def test_classification_is_what_transformers_gives(models: Path) -> None:
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(models / "c").eval(),
        AutoTokenizer.from_pretrained(models / "c"),
    )
    wanted = [model(**tokenizer(t, return_tensors="pt")).logits[0].double().numpy() for t in TEXTS]
    for data in ("c.jsonl", "c.csv"):
        found = outcome(models, models / "c", kind="classification", test=data, batch=4)
        np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
        assert found.labels.tolist() == [1, 0, 1, 0, 0, 1]
    live = outcome(models, models / "c", kind="classification", test="c.jsonl", limit=3)
    assert len(live.labels) == 3


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_linear_head_on_an_encoder(models: Path, tmp_path: Path, pooling: str) -> None:
    weight, bias = torch.randn(3, 16), torch.randn(3)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors", metadata={"classes": "a,no,yes"})
    body, tokenizer = BertModel.from_pretrained(models / "c").eval(), AutoTokenizer.from_pretrained(models / "c")
    wanted = []
    for text in TEXTS:
        states = body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
        wanted.append((F.normalize(pooled, dim=0) @ weight.T + bias).numpy())
    found = outcome(
        models, models / "c", kind="classification", test="c.jsonl", head=str(tmp_path / "head.safetensors"),
        pooling=pooling, normalize=True,
    )  # fmt: skip
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
    assert found.labels.tolist() == [2, 1, 2, 1, 1, 2]


@torch.inference_mode()
def test_sequence_labelling(models: Path) -> None:
    model = BertForTokenClassification.from_pretrained(models / "t").eval()
    ids = [torch.tensor([[11, 13, 12]]), torch.tensor([[5, 4]])]
    wanted = np.concatenate([model(input_ids=i).logits[0].double().numpy() for i in ids])
    found = outcome(models, models / "t", kind="tokens", test="t.jsonl")
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
    assert found.labels.tolist() == [1, 0, 0, 0, 0] and found.units.tolist() == [0, 0, 0, 1, 1]
    conll = models / "t.conll"
    conll.write_text("-DOCSTART- O\n\nAnna N B-P\nsaw V O\nRome N O\n\nthe D O\nfilm N O")
    assert np.array_equal(outcome(models, models / "t", kind="tokens", test="t.conll").scores, found.scores)
    report = lab.evaluate(models / "t", lab.make_task("t", {"kind": "tokens", "test": "t.jsonl"}, folder=models))
    assert {"span_f1", "f1", "accuracy"} <= report["t"].keys()


def test_a_words_first_token_decides(models: Path, tmp_path: Path) -> None:
    """Words that the tokenizer cuts into several tokens."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    folder = classifier(tmp_path / "t", ["O", "B-P"], tokens=True)
    raw = Tokenizer(kinds.WordPiece({"[PAD]": 0, "[UNK]": 1, "An": 2, "##na": 3, "saw": 4}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    jsonl(tmp_path / "d.jsonl", [{"tokens": ["Anna", "saw", "Anna"], "labels": ["B-P", "O", "B-P"]}])
    model = BertForTokenClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([[2, 3, 4, 2, 3]])).logits[0][[0, 2, 3]].double().numpy()
    np.testing.assert_allclose(outcome(tmp_path, folder, kind="tokens", test="d.jsonl").scores, wanted, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("length, context", [(512, 1), (16, 1), (16, 8), (7, 3)])
def test_perplexity_scores_every_token_once(models: Path, length: int, context: int) -> None:
    """Against a loop over tokens, each predicted from the tokens of its window."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(models / "lm").eval(), AutoTokenizer.from_pretrained(models / "lm")
    text = (models / "text.txt").read_text()
    ids = tokenizer(text)["input_ids"]
    found = outcome(models, models / "lm", kind="perplexity", test="text.txt", length=length, context=context, batch=2)
    longest, at, total = min(length, 64), 1, 0.0
    while at < len(ids):
        begin = max(0, at - context)
        window = ids[begin : begin + longest]
        logits = torch.log_softmax(model(torch.tensor([window])).logits[0], -1)
        for j in range(at - begin, len(window)):
            total -= float(logits[j - 1, window[j]])
        at = begin + len(window)
    assert found.nll.sum() == pytest.approx(total, rel=1e-5)
    assert found.tokens.sum() == len(ids) - 1
    first = len(tokenizer.decode(ids[:1]).encode())
    assert found.bytes.sum() == pytest.approx(len(text.encode()) - first)


@torch.inference_mode()
@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_choice_by_log_likelihood(models: Path, normalise: str) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(models / "lm").eval(), AutoTokenizer.from_pretrained(models / "lm")
    found = outcome(models, models / "lm", kind="choice", test="ch.jsonl", normalise=normalise)

    def score(prompt: str, option: str) -> float:
        before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {option}")["input_ids"]
        logits = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
        total = sum(float(logits[j - 1, whole[j]]) for j in range(len(before), len(whole)))
        return total / {"none": 1, "tokens": len(whole) - len(before), "bytes": len(option)}[normalise]

    wanted = [[score("the film was", o) for o in ("good", "very bad")] + [-math.inf],
              [score("Anna saw", o) for o in ("Rome", "a plot", "not")]]  # fmt: skip
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-5)
    assert found.labels.tolist() == [0, 1]


def test_images_from_arrays_and_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 17, (20, 1, 8, 8)), rng.integers(0, 10, 20)
    np.savez(tmp_path / "d.npz", pixels=images, y=labels)
    model = Net().eval()
    write(model, tmp_path / "m")
    said = {"kind": "images", "test": "d.npz", "x": "pixels", "y": "y", "scale": 0.5, "mean": [1.0], "std": [2.0], "batch": 7}
    with torch.inference_mode():
        wanted = model((torch.from_numpy(images).float() * 0.5 - 1) / 2).double().numpy()
    task = lab.make_task("d", said, folder=tmp_path)
    resident = lab.Resident(build=lambda config: Net())
    np.testing.assert_allclose(
        Evaluator(task, resident=resident).outcomes(tmp_path / "m", {"d": "test"})["d", "test"].scores, wanted, atol=1e-5
    )
    live = lab.evaluate(model, task, forward=lambda m, batch: 2 * m(batch))
    assert live["d"]["accuracy"].value == pytest.approx((wanted.argmax(1) == labels).mean())
    assert live["d"]["confidence"].value == pytest.approx(
        np.exp(2 * wanted - np.log(np.exp(2 * wanted).sum(1))[:, None]).max(1).mean(), abs=1e-5
    )


def test_folders_of_pictures(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("dark", 10), ("light", 240)):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4 + i, 4), colour).save(tmp_path / "d" / name / f"{i}.png")

    class Bright(torch.nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (3, 2, 2)
            return torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)

    task = lab.make_task("d", {"kind": "images", "test": "d", "size": [2, 2], "scale": 1 / 255}, folder=tmp_path)
    assert lab.evaluate(Bright(), task)["d"]["accuracy"].value == 1.0
    task = lab.make_task("d", {"kind": "images", "test": "d"}, folder=tmp_path)
    with pytest.raises(Refused, match="pictures differ in size"):
        lab.evaluate(Bright(), task)


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0, 0, 1]}, features=datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])))  # fmt: skip
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "d")
    made.to_parquet(tmp_path / "d.parquet")
    assert read_table(tmp_path / "d", "test").column("label") == LABELS
    assert read_table(tmp_path / "d.parquet").column("text") == TEXTS
    with pytest.raises(Refused, match="which split"):
        read_table(tmp_path / "d")


def test_packages_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "set").mkdir()
    with pytest.raises(Refused, match="needs pyarrow"):
        read_table(tmp_path / "d.parquet")
    with pytest.raises(Refused, match="needs the package datasets"):
        read_table(tmp_path / "set")


def write_tasks(folder: Path, text: str) -> Path:
    (folder / "tasks.yaml").write_text(text)
    return folder / "tasks.yaml"


@pytest.mark.parametrize(
    "said, problem",
    [
        ("tasks: {}", "not a tasks file"),
        ("task: {a: 1}", "not a tasks file"),
        ("tasks:\n  a: {kind: clasification, test: x}", r"tasks.yaml:2:7: there is no kind of task `clasification`\nhint: did you mean `classification`"),
        ("tasks:\n  a: {test: x}", "2:3: needs a `kind`"),
        ("tasks:\n  a: {kind: images}", "2:3: needs data"),
        ("tasks:\n  a: {kind: images, test: x, txet: 1}", "2:30: images has no key `txet`"),
        ("tasks:\n  a: {kind: images, test: x, limit: 0}", "`limit` must be at least 1"),
        ("tasks:\n  a: {kind: images, test: x, limit: true}", "`limit` cannot be True"),
        ("tasks:\n  a: {kind: images, test: x, measures: [perplexity]}", "2:30: images cannot give `perplexity`"),
        ("tasks:\n  a: {kind: images, test: x, measures: [acc]}", "there is no measure `acc`"),
        ("defaults: {lenght: 3}\ntasks:\n  a: {kind: images, test: x}", "1:12: no task here knows `lenght`"),
        ("tasks:\n  a: {kind: classification, test: x, pooling: cls}", "pooling must be one of"),
        ("tasks:\n  a: {kind: classification, test: x, normalize: true}", "belong to a `head`"),
        ("tasks:\n  a: {kind: choice, test: x, normalise: chars}", "normalise must be one of"),
        ("tasks:\n  a: {kind: perplexity, test: x, length: 4, context: 4}", "`context` must be at least 1"),
    ],
)  # fmt: skip
def test_tasks_files_that_are_wrong(tmp_path: Path, said: str, problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        lab.read_tasks(write_tasks(tmp_path, said))


@pytest.mark.parametrize(
    "rows, said, problem",
    [
        ([{"txt": "a", "label": "no"}], {}, r"there is no column `text`\nhint: did you mean `txt`"),
        ([{"text": "a", "label": "maybe"}], {}, r"row 1: the model knows no label 'maybe'\nhint: it knows no, yes"),
        ([{"text": "a", "label": 2}], {}, "row 1: the model knows no label 2"),
        ([{"text": "a", "label": "no"}, {"text": "b"}], {}, "row 2 has no `label`"),
        ([{"text": 3, "label": "no"}], {}, "row 1: `text` is int, expected text"),
        ([], {}, "the split is empty"),
        ([{"text": "a", "label": "x"}], {"labels": ["x", "y", "z"]}, "the model tells 2 classes apart, the task has 3"),
        ([{"text": "a", "label": "no"}], {"text": ["text", "text", "text"]}, "expected one or two"),
    ],
)  # fmt: skip
def test_data_that_is_wrong(models: Path, tmp_path: Path, rows: list, said: dict, problem: str) -> None:
    jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(Refused, match=problem):
        outcome(tmp_path, models / "c", kind="classification", test="d.jsonl", **said)


def test_models_that_cannot_do_the_task(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is a LlamaForCausalLM, which has no classes"):
        outcome(models, models / "lm", kind="classification", test="c.jsonl")
    with pytest.raises(Refused, match="no causal language model"):
        outcome(models, models / "c", kind="perplexity", test="text.txt")
    with pytest.raises(Refused, match="gives words no class"):
        outcome(models, models / "c", kind="tokens", test="t.jsonl")
    with pytest.raises(Refused, match="has no validation split"):
        outcome(models, models / "c", "validation", kind="classification", test="c.jsonl")
    with pytest.raises(Refused, match="cannot give `kl` without a reference"):
        Evaluator(lab.make_task("t", {"kind": "classification", "test": "c.jsonl"}, folder=models)).report(
            models / "c", only={"t": ["kl"]}
        )
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(Refused, match="holds no text"):
        outcome(tmp_path, models / "lm", kind="perplexity", test="empty.txt")
    jsonl(tmp_path / "ch.jsonl", [{"prompt": "a", "choices": ["x", "y"], "answer": "z"}])
    with pytest.raises(Refused, match="the answer 'z' is none of its 2 choices"):
        outcome(tmp_path, models / "lm", kind="choice", test="ch.jsonl")


def test_a_tokenizer_that_does_not_match(models: Path, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", ["no", "yes"])
    write_tokenizer(folder, [f"w{i}" for i in range(40)] + ["[UNK]", "[PAD]"])
    with pytest.raises(Refused, match=r"tokenizer does not match: token .* is number 41, the embedding has 15 rows"):
        outcome(models, folder, kind="classification", test="c.jsonl")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(Refused, match="has no tokenizer"):
        outcome(models, folder, kind="classification", test="c.jsonl")


def test_a_live_module_with_a_tokenizer(models: Path) -> None:
    model, tokenizer = BertForSequenceClassification.from_pretrained(models / "c"), AutoTokenizer.from_pretrained(models / "c")
    task = lab.make_task("t", {"kind": "classification", "test": "c.jsonl"}, folder=models)
    live = lab.evaluate(model, task, tokenizer=tokenizer)
    assert live["t"] == lab.evaluate(models / "c", task)["t"]
    assert json.dumps(live.as_dict()) and "accuracy" in str(live)
