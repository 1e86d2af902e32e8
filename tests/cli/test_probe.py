"""surgery probe and surgery eval on real files, and the report of all that they print."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import surgery

from surgery.cli.eval_ import command as evaluate
from surgery.cli.probe_ import command as probe
from surgery.cli.report_ import command as report
from surgery.errors import Refused

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)
    def forward(self, x):
        return x + torch.tanh(self.fc(self.ln(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(16, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
    def forward(self, x):
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build(config):
    return Net()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import runpy

    import numpy as np
    import torch
    from safetensors.torch import save_file

    made = tmp_path_factory.mktemp("probe")
    (made / "net.py").write_text(NET)
    net = runpy.run_path(str(made / "net.py"))["Net"]
    rng = np.random.default_rng(0)
    np.savez(made / "d.npz", images=rng.random((60, 1, 4, 4)).astype(np.float32), labels=rng.integers(0, 3, 60))
    (made / "tasks.yaml").write_text(
        "tasks:\n  d: {kind: images, validation: d.npz, test: d.npz, corruptions: [noise, shift]}\n"
    )
    torch.manual_seed(0)
    base = net().state_dict()
    for i, name in enumerate(("base", "a", "b")):
        state = {k: v + 0.3 * i * torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) for k, v in base.items()}
        (made / name).mkdir()
        save_file({k: v.contiguous() for k, v in state.items()}, made / name / "model.safetensors")
    (made / "transfer.yaml").write_text(
        "models: {base: base, a: a, b: b}\nsteps:\n  d: {op: diff, of: [a, base]}\n  out: {op: transfer, of: [b, d]}\noutput: {from: out}\n"
    )
    (made / "mean.yaml").write_text("models: {a: a, b: b}\nsteps:\n  out: {op: average, of: [a, b]}\noutput: {from: out}\n")
    (made / "both.yaml").write_text("ensemble: {kind: logits, members: [a, b]}\n")
    return made


def call(command, folder: Path, *args: str) -> str:
    held = ["--tasks", str(folder / "tasks.yaml"), "--module", f"{folder}/net.py:build", "--resamples", "40"]
    given = [str(folder / a) if (folder / a).exists() else a for a in args]
    done = CliRunner().invoke(command, [*given, *([] if "overlap" in args else held)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_probe_says_and_prints_the_same(folder: Path, tmp_path: Path) -> None:
    said = call(probe, folder, "path", "base", "a", "--points", "3")
    assert "from base (alpha 0) to a (alpha 1)" in said and "barrier" in said and "bootstrap with 40 resamples" in said
    made = {
        "path": ["path", "transfer.yaml", "--points", "3", "--json"],
        "layers": ["layers", "base", "a", "--points", "2", "--json"],
        "contribution": ["contribution", "base", "a", "--json"],
        "overlap": ["overlap", "base", "a", "b", "--share", "0.1", "--json"],
    }
    found = {name: json.loads(call(probe, folder, *args)) for name, args in made.items()}
    assert found["path"]["lines"][0]["title"] == "transfer `out`" and len(found["path"]["lines"][0]["paths"]) == 3
    assert {x["layer"] for x in found["layers"]["profiles"][0]["profile"]} >= {"embed", "blocks.0", "head"}
    tuco = found["contribution"]["contributions"][0]["tuco"]
    assert f"TuCo {tuco['value']:.3f} [{tuco['low']:.3f}, {tuco['high']:.3f}]" in call(
        probe, folder, "contribution", "base", "a"
    )
    share = found["overlap"]["overlap"][0][1]
    assert f"{share:.3f}" in call(probe, folder, "overlap", "base", "a", "b", "--share", "0.1")
    undone = found["layers"]["profiles"][0]["profile"][0]["undone"]["value"]
    assert f"{undone:.3f}" in call(probe, folder, "layers", "base", "a", "--points", "2")
    pytest.importorskip("matplotlib")
    for name, data in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    done = CliRunner().invoke(report, [*(str(tmp_path / f"{n}.json") for n in found), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "r.html").read_text()
    assert all(x in text for x in ("Overlap of skills", "TuCo by task", "Every layer", "Barriers"))
    assert f'data-value="{share!r}"' in text


def test_evaluating_recipes_beside_ensembles_and_their_own(folder: Path) -> None:
    found = json.loads(call(evaluate, folder, "mean.yaml", "--ensemble", "--json"))
    assert [m["model"] for m in found["models"]] == ["mean", "a", "b", "ensemble"]
    assert {"false_false_true", "true_true_false"} <= found["models"][0]["tasks"]["d"]["measures"].keys()
    fused = json.loads(call(evaluate, folder, "both.yaml", "--json"))["models"][0]["tasks"]["d"]["measures"]["accuracy"]
    assert fused == found["models"][3]["tasks"]["d"]["measures"]["accuracy"]
    said = call(evaluate, folder, "base", "a", "b", "--baseline", "base", "--baseline", "a")
    assert "robustness of accuracy on d under noise, shift:" in said and "effective robustness" in said


@pytest.mark.parametrize(
    "args, problem",
    [
        (["path", "base"], "has no `transfer` of a difference"),
        (["path", "base", "a", "b"], "a path is between two models, got 3"),
        (["path", "base", "a", "--measure", "acc"], "there is no measure `acc`"),
        (["layers", "base", "a", "--only", "x"], "no layer matches x"),
    ],
)
def test_what_probes_refuse(folder: Path, args: list[str], problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        call(probe, folder, *args)


def test_what_eval_refuses(folder: Path) -> None:
    with pytest.raises(Refused, match="nothing to evaluate on"):
        CliRunner().invoke(evaluate, [str(folder / "base")], catch_exceptions=False)
    with pytest.raises(Refused, match="averages two models or more"):
        call(evaluate, folder, "base", "--ensemble")
    with pytest.raises(Refused, match="one gives no line"):
        call(evaluate, folder, "base", "a", "--baseline", "base")


def test_they_are_commands(folder: Path) -> None:
    done = surgery("probe", "overlap", folder / "base", folder / "a", folder / "b")
    assert done.returncode == 0 and "that changed" in done.stdout
    wrong = surgery("probe", "overlap", folder / "base", folder / "a")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: overlap is between two or more models")
