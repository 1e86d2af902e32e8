"""What a tune file may say, and how what it may not say is refused: at its place, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.errors import Refused
from surgery.recipe.document import Document
from surgery.tuning.schema import AVERAGES, METHODS
from surgery.tuning.settings import Job, read_job, read_settings

HEAD = "model: base/\ntask: {kind: causal, train: text.txt}\n"


def read(tmp_path: Path, text: str) -> Job:
    path = tmp_path / "tune.yaml"
    path.write_text(text)
    document = Document(path)
    return read_job(document.data, document.place)


def test_defaults(tmp_path: Path) -> None:
    job = read(tmp_path, HEAD)
    assert (job.model, job.output, job.settings.method, job.settings.average) == ("base/", "checkpoint", "full", None)
    assert job.settings.regularise == {"clip": 1.0} and job.settings.epochs == 3 and job.task["completion_only"] is False


def test_methods_and_averages_with_and_without_options(tmp_path: Path) -> None:
    made = read(tmp_path, HEAD + "method: {last: 2}\naverage: {ema: {decay: 0.9}}\n").settings
    assert (made.method, made.options, made.average_options) == ("last", 2, {"decay": 0.9, "debias": False})
    made = read(tmp_path, HEAD + "method: lift\naverage: swa\n").settings
    assert made.options == {"rank": 32, "density": 0.05, "every": 200} and made.average_options == {"start": 0.5}
    assert read(tmp_path, HEAD + "method: {lora: {r: 4}}\n").output == "adapter"
    assert read(tmp_path, HEAD + "method: lora\noutput: delta\n").output == "delta"


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("[1, 2]", "1:1", "not a tune file"),
        ("task: {kind: causal, train: t}", "1:1", "needs `model`"),
        ("model: 3\ntask: {kind: causal, train: t}", "1:1", "model"),
        ("model: m\ntask: {kind: casual, train: t}", "2:8", "did you mean `causal`"),
        ("model: m\ntask: causal", "2:1", "kind"),
        ("model: m\ntask: {kind: causal}", "2:1", "task needs `train`"),
        ("model: m\ntask: {kind: causal, train: t, lenght: 3}", "2:32", "did you mean `length`"),
        (HEAD + "metod: full", "3:1", "did you mean `method`"),
        (HEAD + "method: haf", "3:1", "did you mean `half`"),
        (HEAD + "method: [half]", "3:1", "a name"),
        (HEAD + "method: last", "3:1", "last needs a number"),
        (HEAD + "method: {last: 0}", "3:10", "method.last"),
        (HEAD + "method: {last: true}", "3:10", "method.last"),
        (HEAD + "method: {full: {a: 1}}", "3:10", "full has no options"),
        (HEAD + "method: {lift: {dens: 0.1}}", "3:17", "did you mean `density`"),
        (HEAD + "method: {lift: {density: 0.1, budget: 3}}", "3:10", "not both"),
        (HEAD + "method: {lt_sft: {density: 2}}", "3:19", "density"),
        (HEAD + "average: emma", "3:1", "did you mean `ema`"),
        (HEAD + "average: {ema: {decay: 1}}", "3:17", "decay"),
        (HEAD + "regularise: {l2sp: 1}", "3:14", "did you mean `l2_sp`"),
        (HEAD + "lr: 0", "3:1", "lr"),
        (HEAD + "lr: fast", "3:1", "lr"),
        (HEAD + "batch: 2.5", "3:1", "batch"),
        (HEAD + "schedule: lineal", "3:1", "did you mean `linear`"),
        (HEAD + "output: detla", "3:1", "did you mean `delta`"),
        (HEAD + "output: adapter", "3:1", "only `method: lora`"),
        (HEAD + "method: lora\nregularise: {mixout: 0.5}", "4:14", "lora"),
        (HEAD + "method: lora\nlayer_decay: 0.5", "4:1", "adapter"),
        (HEAD + "average: stock\nmethod: lift", "3:1", "stock"),
        (HEAD + "average: stock\nepochs: 1.5", "4:1", "whole epochs"),
        (HEAD + "average: stock\nsteps: 5", "4:1", "give epochs"),
        (HEAD + "average: elastic\nmethod: lift", "3:1", "elastic"),
    ],
)
def test_what_cannot_be_used_is_refused_at_its_place(tmp_path: Path, text: str, place: str, what: str) -> None:
    with pytest.raises(Refused) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'tune.yaml'}:{place}: "), str(caught.value)
    assert what in str(caught.value)


def test_every_method_and_average_says_what_it_is() -> None:
    for table in (METHODS, AVERAGES):
        for name, schema in table.items():
            inner = schema.get("properties", {})
            assert inner or schema.get("description"), name
            assert all(p.get("description") for p in inner.values()), name
    assert read_settings({"method": "bitfit"}, lambda *p: "").options is None


@pytest.mark.parametrize("train", [[], ["one.csv"], 3, [1, 2]])
def test_a_stream_is_two_files_or_more(train: Any) -> None:
    with pytest.raises(Refused, match=r"task\.train cannot be .*\nhint: A file; or several, which are a stream of tasks"):
        read_job({"model": "m", "task": {"kind": "causal", "train": train}}, lambda *p: ".".join(map(str, p)))
