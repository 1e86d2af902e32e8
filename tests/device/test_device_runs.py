"""`--device`: what it says, what it refuses, and what it does when the device is too small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import all_bytes, plan, recipe, run, surgery, trio

import surgery as package
from surgery.device import crew, share
from surgery.device.choose import Device, choose
from surgery.device.crew import OnDevice, hire
from surgery.errors import Refused

DELTAS = "da: {op: diff, of: [a, base]}\ndb: {op: diff, of: [b, base]}\n"
MIXED = DELTAS + (
    "t: {op: tsv, of: [da, db]}\ns: {op: add, of: [base, t], weight: 0.5}\n"
    "e: {op: ties, of: [da, db], density: 0.3}\nout: {op: add, of: [s, e], weight: 0.5}"
)
TSV = DELTAS + "t: {op: tsv, of: [da, db]}\nout: {op: add, of: [base, t]}"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    trio(tmp_path, hidden=32, vocab=300, depth=1)
    return tmp_path


def on(device: Device, said: list[str]) -> Callable[..., Any]:
    return lambda plan, terms: OnDevice(plan, terms, device, said.append, lambda text: None)


def test_the_command(models: Path) -> None:
    path = recipe(models, TSV)
    assert surgery("run", path, "-o", models / "here").returncode == 0
    done = surgery("run", path, "-o", models / "there", "--device", "torch:cpu", "--profile")
    assert done.returncode == 0 and all_bytes(models / "there") == all_bytes(models / "here")
    for said in ("DEVICE torch's processor backend: needs", "tensors: weighted sums, piece by piece", "4 tensors: tsv", "device  "):
        assert said in done.stderr
    shown = surgery("plan", path, "--device", "torch:cpu", "--json")
    there = json.loads(shown.stdout)["device"]
    assert there["sums"] + there["matrices"]["tsv"]["tensors"] == len(json.loads(shown.stdout)["output"]["tensors"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda(models: Path) -> None:
    path = recipe(models, TSV)
    done = surgery("run", path, "-o", models / "out", "--device", "cuda")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[0].startswith("error: --device cuda: torch ") and len(lines) == 2
    assert not (models / "out").exists() and not (models / "out.partial").exists()
    with pytest.raises(Refused, match="--device cuda:1: torch"):
        package.load(path).save(models / "other", device="cuda:1")
    with pytest.warns(UserWarning, match="everything runs on the processor"):
        package.load(path).save(models / "other", device="auto")


def test_names(models: Path) -> None:
    for name in ("gpu", "cuda:", "cuda:x", "torch:cuda", "", "mps"):
        with pytest.raises(Refused, match=r"no such device"):
            choose(name, pytest.fail)
    done = surgery("run", recipe(models, TSV), "-o", models / "out", "--engine", "ray", "--device", "cuda")
    assert done.returncode == 2 and "--device is of the threads of this process" in done.stderr


def test_what_runs_where(models: Path) -> None:
    found = share.Share.of(plan(recipe(models, MIXED)), Device("x", torch.device("cpu"), "x"))
    assert found.matrices["tsv"][0] == 4 and not found.sums  # ties takes part in every tensor
    assert found.rest == {"ties computes there": 2}
    text = found.text(2)
    assert "4 tensors: tsv" in text and "2 tensors on the processor: ties computes there" in text
    copied = share.Share.of(plan(recipe(models, "out: {op: pass, of: a}", models=["a"])), Device("x", torch.device("cpu"), "x"))
    assert copied.rest == {"copied": 6}
    wide = plan(recipe(models, "out: {op: average, of: [a, b]}", models=["a", "b"], output="{from: out, precision: float64}"))
    assert share.Share.of(wide, Device("x", torch.device("cpu"), "x")).rest == {"float64 sums": 6}


def test_matrix_operators_and_sums_on_another_machines_memory(models: Path, pretended: Any) -> None:
    for steps in (TSV, MIXED):
        path = recipe(models, steps)
        run(path, models / "here", overwrite=True)
        run(path, models / "there", overwrite=True, hire=on(pretended, []))
        assert all_bytes(models / "there") == all_bytes(models / "here")


def test_a_device_that_is_too_small(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of work stay here, each said once; the plan says so before."""
    path, said = recipe(models, TSV), list[str]()
    run(path, models / "here")
    small = Device("small", torch.device("cpu"), "small:0")
    monkeypatch.setattr(Device, "free", lambda self: 1000)
    asked = share.Share.of(plan(path), small).text(1)
    assert "of 1 kB free" in asked and "more than there is, on the processor" in asked
    monkeypatch.setattr(crew.Lane, "send", lambda *args: pytest.fail("sent"))
    run(path, models / "there", hire=on(small, said))
    assert all_bytes(models / "there") == all_bytes(models / "here")
    assert len(said) == 2 and "sums run on the processor" in said[0] and "tsv needs" in said[1]


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("no"), torch.linalg.LinAlgError("did not converge")])
def test_a_device_that_fails_on_the_way(models: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    path, said = recipe(models, TSV), list[str]()
    run(path, models / "here")
    device = Device("x", torch.device("cpu"), "x:0")

    def fails(*args: Any) -> Any:
        raise problem

    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *to, **more: fails() if to == (device.torch,) else real(x, *to, **more))
    if isinstance(problem, torch.OutOfMemoryError):
        monkeypatch.setattr(crew.Lane, "send", fails)
    run(path, models / "there", hire=on(device, said))
    assert all_bytes(models / "there") == all_bytes(models / "here")
    assert any("tsv" in text for text in said) and len(said) == len(set(said))


def test_a_run_goes_on_with_and_without(models: Path) -> None:
    path = recipe(models, "out: {op: average, of: [base, a, b]}")
    run(path, models / "whole")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, models / "out", threads=1, hire=hire("torch:cpu", pytest.fail), progress=stop)
    report = run(path, models / "out", resume=True)
    assert all_bytes(models / "out") == all_bytes(models / "whole") and report.tensors == 6


def test_memory_that_does_not_suffice_is_refused(models: Path) -> None:
    path = recipe(models, "out: {op: average, of: [base, a, b]}")
    run(path, models / "out", memory="160MB", threads=1)
    with pytest.raises(Refused, match="needs at least"):  # torch and the buffers are reckoned with
        run(path, models / "out", memory="160MB", threads=1, overwrite=True, hire=hire("torch:cpu", pytest.fail))
