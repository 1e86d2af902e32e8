"""Streams of tasks: trained on one after the other in one run, and what momentum interpolation keeps of the first ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tuning_models import record, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
from lab_rig import Net, domains

from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.rows import Stream
from surgery.tuning.run import run
from surgery.tuning.settings import read_job


def test_a_stream_is_its_stages_in_order_each_epoch_once() -> None:
    items = [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)]
    order = [x for x in Stream(items, [5, 3], 2, seed=4)]  # noqa: C416
    assert sorted(order[:5]) == sorted(order[5:10]) == items[:5] and order[:5] != order[5:10]
    assert sorted(order[10:13]) == sorted(order[13:]) == items[5:]
    assert order == list(Stream(items, [5, 3], 2, seed=4)) != list(Stream(items, [5, 3], 2, seed=5))


def test_momentum_interpolation_keeps_what_the_stream_forgets(digits: dict[str, torch.Tensor]) -> None:
    """Stojanovski et al. 2022 at this size: after two tasks in a row slow weights know all domains better than fast ones."""
    data = domains()
    stream, stages = [], []
    for name in ("rot90", "inv"):
        images, labels = (x[:400] for x in data[name]["train"])
        stream += [(torch.from_numpy(x), int(y)) for x, y in zip(images, labels, strict=True)]
        stages.append(len(images))

    def mean(**more: Any) -> float:
        model = Net()
        model.load_state_dict(digits)
        model.eval()
        tune(model, stream, stages=stages, loss=F.cross_entropy, batch=64, lr=2e-3, epochs=10, schedule="constant", **more)
        with torch.inference_mode():
            found = [(model(torch.from_numpy(s["test"][0])).argmax(1).numpy() == s["test"][1]).mean() for s in data.values()]
        return float(np.mean(found))

    fast, slow = mean(), mean(average={"ema": {"decay": 0.998}})
    assert slow >= fast + 0.1


def job(home: Path, train: Any, **more: Any) -> Any:
    task = {"kind": "classification", "train": train, "validation": str(home / "train.csv")}
    said = {"model": str(home / "bert"), "task": task, "epochs": 2, "lr": 0.01, "batch": 8, "save_every": 2}
    return read_job(said | more, lambda *p: ".".join(map(str, p)))


def test_a_stream_from_files_resumes_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    (tmp_path / "second.csv").write_text("text,label\n" + "the cat,cats\nin a,dogs\n" * 8)
    files = [str(home / "train.csv"), str(tmp_path / "second.csv")]
    run(job(home, files), str(tmp_path / "whole"))
    told = record(tmp_path / "whole")
    assert told["examples"]["train"] == 24 + 16 and [d["file"] for d in told["data"]] == ["train.csv", "second.csv", "train.csv"]

    def cut(step: int, total: int, loss: float) -> None:
        assert total == 10  # (24 + 16) x 2 / 8
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(home, files), str(tmp_path / "cut"), progress=cut)
    run(job(home, files), str(tmp_path / "cut"), resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.dumps(record(tmp_path / "cut")) == json.dumps(told)
    with pytest.raises(Refused, match="a stream of tasks needs whole epochs"):
        run(job(home, files, average="stock"), str(tmp_path / "s"))
    with pytest.raises(Refused, match=r"nowhere\.csv: there is no such file"):
        run(job(home, [files[0], "nowhere.csv"]), str(tmp_path / "s"))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_history_has_a_line_for_every_pass_over_a_stage(batch: int) -> None:
    """Also where a batch holds the end of one stage and the beginning of the next, or a stage as a whole."""
    sizes, epochs = [6, 2, 5], 2
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, generator=draw), i % 2) for i in range(sum(sizes))]
    made = tune(torch.nn.Linear(4, 2), data, stages=sizes, epochs=epochs, batch=batch, lr=0.1, loss=F.cross_entropy, device="cpu",
                validation=data[:4])  # fmt: skip
    assert [(h["stage"], h["pass"]) for h in made.history] == [(s, p) for s in (1, 2, 3) for p in (1, 2)]
    ends = np.cumsum([n for n in sizes for _ in range(epochs)])
    assert [h["step"] for h in made.history] == [-(-int(e) // batch) for e in ends]
    assert all(np.isfinite(h["loss"]) for h in made.history) and "validation_loss" in made.history[-1]
    plain = tune(torch.nn.Linear(4, 2), data, epochs=2, batch=batch, lr=0.1, loss=F.cross_entropy, device="cpu")
    assert len(plain.history) == 2 and all("stage" not in h for h in plain.history)
