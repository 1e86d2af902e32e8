"""A run that was cut off and resumed leaves the same bytes as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import Failed, Refused
from surgery.tuning.run import run
from surgery.tuning.settings import read_job

CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    # settings, and the steps (counted over all phases) at which the run is cut off
    "dropout, ema, mixout, saved within epochs": (
        {"average": {"ema": {"decay": 0.8}}, "regularise": {"mixout": 0.5, "l2_sp": 0.1}, "save_every": 2}, [3, 8],
    ),
    "ends of epochs, swa": ({"average": {"swa": {"start": 0.2}}}, [5]),
    "lift, whose mask moves": ({"method": {"lift": {"rank": 2, "every": 2}}, "save_every": 3}, [5]),
    "lt-sft, first phase": ({"method": {"lt_sft": {"density": 0.1}}}, [5]),
    "lt-sft, second phase": ({"method": {"lt_sft": {"density": 0.1}}}, [9 + 5]),
    "diff pruning, gates": ({"method": {"diff_pruning": {"density": 0.1}}, "save_every": 2}, [5]),
    "diff pruning, fixed mask": ({"method": {"diff_pruning": {"density": 0.1}}}, [9 + 5]),
    "stock": ({"average": "stock", "epochs": 2}, [5, 8]),
    "elastic": ({"average": {"elastic": {"every": 4, "decay": 0.5}}}, [7]),
    "lora": ({"method": {"lora": {"r": 2, "lora_dropout": 0.1}}}, [4]),
    "half, two batches a step": ({"method": "half", "batch": 4, "accumulate": 2}, [4]),
}  # fmt: skip


def job(home: Path, **said: Any) -> Any:
    task = {"kind": "classification", "train": str(home / "train.csv"), "validation": str(home / "train.csv")}
    plain = {"model": str(home / "bert"), "task": task, "epochs": 3, "lr": 0.01, "batch": 8, "weight_decay": 0.1}
    return read_job(plain | said, lambda *p: ".".join(map(str, p)))


def cut(at: int) -> Any:
    steps = 0

    def progress(step: int, total: int, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            raise KeyboardInterrupt

    return progress


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_resumed_bytes_are_the_same(home: Path, tmp_path: Path, case: str) -> None:
    said, cuts = CASES[case]
    run(job(home, **said), str(tmp_path / "whole"))
    out, resume = tmp_path / "cut", False
    before = 0
    for at in cuts:
        with pytest.raises(KeyboardInterrupt):
            run(job(home, **said), str(out), resume=resume, progress=cut(at - before))
        torch.manual_seed(99)  # whatever the next process starts with
        before, resume = saved(said, at), True
    assert not out.exists() and (tmp_path / "cut.partial").is_dir()
    run(job(home, **said), str(out), resume=True)
    assert files(out) == files(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()
    assert "model.safetensors" in files(out) or "adapter_model.safetensors" in files(out)


def saved(said: dict[str, Any], at: int) -> int:
    """Steps that a resumed run does not take again: up to the last saved state."""
    every = said.get("save_every", 3)
    return (at - 1) // every * every


def test_a_saved_state_that_was_not_finished_is_not_used(home: Path, tmp_path: Path) -> None:
    run(job(home), str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(job(home), str(tmp_path / "cut"), progress=cut(8))
    states = sorted((tmp_path / "cut.partial" / ".training").glob("checkpoint-*"))
    assert [p.name for p in states] == ["checkpoint-3", "checkpoint-6"]
    (states[-1] / "complete").unlink()
    (states[-1] / "surgery.pt").write_bytes(b"torn")
    run(job(home), str(tmp_path / "cut"), resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_that_was_cut_off_while_writing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.tuning.run as module

    said = {"method": {"lt_sft": {"density": 0.1}}, "average": {"ema": {"decay": 0.5}}}
    run(job(home, **said), str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checkpoint", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError):
            run(job(home, **said), str(tmp_path / "cut"))
    run(job(home, **said), str(tmp_path / "cut"), resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_another_run_cannot_be_resumed(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no unfinished run"):
        run(job(home), str(tmp_path / "o"), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(job(home), str(tmp_path / "o"), progress=cut(2))
    with pytest.raises(Refused, match="another plan"):
        run(job(home, lr=0.02), str(tmp_path / "o"), resume=True)
    with pytest.raises(Refused, match="unfinished run"):
        run(job(home), str(tmp_path / "o"))
    run(job(home), str(tmp_path / "o"), overwrite=True)
    with pytest.raises(Refused, match="already holds something"):
        run(job(home), str(tmp_path / "o"))


def test_a_loss_that_is_not_finite_leaves_the_weights_from_before(home: Path, tmp_path: Path) -> None:
    import transformers

    with pytest.raises(Failed, match=r"stopped at step \d+: .*last-good") as caught:
        run(job(home, lr=1e30, regularise={"clip": 0}), str(tmp_path / "o"))
    assert caught.value.exit_code == 1 and not (tmp_path / "o").exists()
    good = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o.partial" / "last-good")
    assert all(bool(p.isfinite().all()) for p in good.parameters())
