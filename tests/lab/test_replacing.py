"""`surgery sweep --overwrite`: what was there stays until the new sweep is whole, and nothing that a sweep reads is replaced."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lab_rig import Net, write

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Settings

FAST = Settings(resamples=20)
GRID = """recipe: merge.yaml
dimensions: {{steps.merged.weight: [{values}]}}
objective: {{rot90: accuracy}}
tasks: tasks.yaml
"""


def sweep_file(work: Path, values: str) -> Path:
    (work / "s.yaml").write_text(GRID.format(values=values))
    return work / "s.yaml"


def trials(folder: Path) -> list[float]:
    told = json.loads((folder / "results.json").read_text())
    return [t["params"]["steps.merged.weight"] for t in told["trials"]]


def carry_out(work: Path, values: str, resident: lab.Resident, **how: Any) -> Any:
    return lab.sweep(sweep_file(work, values), work / "out", resident=resident, settings=FAST, **how)


def test_a_sweep_is_replaced_whole(work: Path, resident: lab.Resident) -> None:
    carry_out(work, "0.1, 0.2, 0.3", resident)
    (work / "out" / "mine.txt").write_text("of the old one")
    during: list[list[float]] = []
    made = carry_out(work, "0.5", resident, overwrite=True, told=lambda *_: during.append(trials(work / "out")))
    assert during == [[0.1, 0.2, 0.3]]
    assert made.out == work / "out" and trials(work / "out") == [0.5] and not (work / "out" / "mine.txt").exists()
    assert not (work / "out.partial").exists() and not (work / "out.replaced").exists()
    found = lab.evaluate(work / "out" / "best.yaml", work / "tasks.yaml", resident=resident, settings=FAST)
    told = json.loads((work / "out" / "results.json").read_text())
    assert told["chosen"]["test"]["rot90"]["measures"]["accuracy"]["value"] == found["rot90"]["accuracy"].value
    again = carry_out(work, "0.5", resident, resume=True)  # it is an ordinary sweep
    assert len(again.trials) == 1
    new = lab.sweep(sweep_file(work, "0.4"), work / "fresh", resident=resident, settings=FAST, overwrite=True)
    assert trials(new.out) == [0.4] and not (work / "fresh.partial").exists()


def test_one_that_was_cut_off_goes_on(work: Path, resident: lab.Resident) -> None:
    carry_out(work, "0.1", resident)

    def stop(trial: Any, *_: Any) -> None:
        if trial.number == 2:
            raise KeyboardInterrupt

    for _ in range(2):  # the second time it starts afresh
        with pytest.raises(KeyboardInterrupt):
            carry_out(work, "0.2, 0.3, 0.4", resident, overwrite=True, told=stop)
        assert trials(work / "out") == [0.1] and len((work / "out.partial" / "trials.jsonl").read_text().splitlines()) == 2
    seen: list[float] = []
    before = resident.show

    def counted(plan: Any, name: str) -> Any:
        seen.append(1.0)
        return before(plan, name)

    resident.show = counted  # type: ignore[method-assign]
    made = carry_out(work, "0.2, 0.3, 0.4", resident, overwrite=True, resume=True)
    assert len(made.trials) == 3 and trials(work / "out") == [0.2, 0.3, 0.4]
    assert len(seen) == 2  # one trial and the test
    assert not (work / "out.partial").exists()


def test_a_sweep_that_fails_leaves_what_was_there(work: Path, resident: lab.Resident) -> None:
    carry_out(work, "0.1", resident)
    old = {p.name: p.read_bytes() for p in (work / "out").iterdir()}
    with pytest.raises(Refused):
        carry_out(work, "true", resident, overwrite=True)
    assert {p.name: p.read_bytes() for p in (work / "out").iterdir()} == old
    assert not (work / "out.partial").exists()


def test_inputs_and_other_things_are_not_replaced(work: Path, resident: lab.Resident, tmp_path_factory: Any) -> None:
    path = sweep_file(work, "0.1")
    real = tmp_path_factory.mktemp("inputs")
    write(Net(), real / "model")
    (work / "rot90").unlink()
    (work / "rot90").symlink_to(real / "model")
    for out in (work, real, real / "model", work / "s.yaml"):
        with pytest.raises(Refused, match="the output is, holds or lies in the input"):
            lab.sweep(path, out, resident=resident, settings=FAST, overwrite=True)
    assert (real / "model" / "model.safetensors").exists() and path.exists()
    carry_out(work, "0.1", resident)
    lock = os.open(work / "out" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="another sweep is writing it"):
        carry_out(work, "0.2", resident, overwrite=True)
    os.close(lock)
    (work / "out.partial").mkdir()
    (work / "out.partial" / "notes").write_text("not ours")
    with pytest.raises(Refused, match=r"out\.partial: is not empty and holds no sweep"):
        carry_out(work, "0.2", resident, overwrite=True)
    assert (work / "out.partial" / "notes").exists() and trials(work / "out") == [0.1]
    with pytest.raises(Refused, match="already holds a sweep\nhint: --resume goes on with it, --overwrite replaces it"):
        carry_out(work, "0.2", resident)


def test_a_sweep_without_a_mask_is_none(work: Path, resident: lab.Resident) -> None:
    from click.testing import CliRunner

    from surgery.cli.probe_masks import command

    carry_out(work, "0.1", resident)
    found = CliRunner().invoke(command, [str(work / "out"), str(work / "out")])
    assert isinstance(found.exception, Refused) and "out: a sweep that wrote no mask" in str(found.exception)
