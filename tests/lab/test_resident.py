"""The live model that follows plans: the bytes a run would write, and nothing computed that has not changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_checkpoint
from lab_rig import WORDS, Net, classifier, language_model, write, write_tokenizer

import surgery
import surgery.lab as lab
from surgery.engine.compute import compute
from surgery.engine.jobs import MeasurePhase
from surgery.engine.plan import make_plan
from surgery.engine.run import run
from surgery.errors import Refused
from surgery.graph.stitch import make
from surgery.lab.resident import Resident
from surgery.lab.room import Room
from surgery.lab.token import Tokens
from surgery.ops import registry


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    for i, name in enumerate(("base", "a", "b")):
        language_model(folder / name, seed=i, dtype=torch.bfloat16)
    return folder


RECIPES = {
    "lerp": ("  merged: {{op: lerp, of: [base, a], alpha: {x}}}", (0.2, 0.7)),
    "slerp": ("  merged: {{op: slerp, of: [base, a], t: {x}}}", (0.2, 0.7)),
    "stock": ("  merged: {{op: stock, of: [base, a, b], granularity: {x}}}", ("tensor", "global")),
    "ties": (
        "  da: {{op: diff, of: [a, base]}}\n  db: {{op: diff, of: [b, base]}}\n"
        "  t: {{op: ties, of: [da, db], density: {x}}}\n  merged: {{op: add, of: [base, t], weight: 0.6}}",
        (0.3, 0.5),
    ),
    "weight of ties": (
        "  da: {{op: diff, of: [a, base]}}\n  db: {{op: diff, of: [b, base]}}\n"
        "  t: {{op: ties, of: [da, db], density: 0.4, trim: global}}\n  merged: {{op: add, of: [base, t], weight: {x}}}",
        (0.3, 0.5, 0.9),
    ),
    "dare": (
        "  da: {{op: diff, of: [a, base]}}\n  t: {{op: dare, of: da, density: 0.5, seed: {x}}}\n"
        "  merged: {{op: add, of: [base, t]}}",
        (1, 2),
    ),
    "map of globs": ('  merged: {{op: lerp, of: [base, a], alpha: {{"*layers.1*": {x}, "*": 0.5}}}}', (0.1, 0.9)),
    "depth": ("  merged: {{op: lerp, of: [base, a], alpha: [{x}, 0.5]}}", (0.1, 0.9)),
}


def recipe(folder: Path, name: str, x: object, dtype: str = "bfloat16") -> Path:
    text = RECIPES[name][0].format(x=x)
    used = [m for m in ("base", "a", "b") if f"{m}," in text or f"{m}]" in text]
    path = folder / "r.yaml"
    path.write_text(
        f"models: {{{', '.join(f'{m}: {m}' for m in used)}}}\nsteps:\n{text}\noutput: {{from: merged, dtype: {dtype}}}\n"
    )
    return path


def planned(path: Path):
    from surgery.recipe.native import read_recipe

    read = read_recipe(path, {})
    return make_plan(read.node, read.settings)


def held(module) -> dict[str, np.ndarray]:
    return {n: p.detach().contiguous().view(-1).view(torch.uint8).numpy().copy() for n, p in module.state_dict().items()}


@pytest.mark.parametrize("memory", [0, 1 << 14, 1 << 30])
@pytest.mark.parametrize("name", RECIPES)
def test_it_holds_the_bytes_that_a_run_writes(trio: Path, tmp_path: Path, name: str, memory: int) -> None:
    resident = Resident(memory=memory, threads=2)
    for i, x in enumerate([*RECIPES[name][1], RECIPES[name][1][0]]):
        path = recipe(trio, name, x)
        subject = resident.show(planned(path), "m")
        assert resident.last.fresh == (i == 0)
        run(planned(path), tmp_path / str(i), threads=1)
        own = held(subject.module)
        for key, value in read_checkpoint(tmp_path / str(i)).items():
            assert own[key].tobytes() == value.tobytes(), (x, key)


def test_only_what_changed_is_computed(trio: Path) -> None:
    resident = Resident()
    resident.show(planned(recipe(trio, "map of globs", 0.1)), "m")
    whole = resident.last.tensors
    before = held(resident.show(planned(recipe(trio, "map of globs", 0.1)), "m").module)
    assert resident.last.tensors == 0
    after = held(resident.show(planned(recipe(trio, "map of globs", 0.9)), "m").module)
    assert 0 < resident.last.tensors < whole / 2
    assert {n for n in before if not np.array_equal(before[n], after[n])} <= {n for n in before if "layers.1" in n}


def test_shared_parts_are_computed_once(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new weight of a TIES delta reads neither model again, and elects no signs again."""
    resident = Resident(memory=1 << 30)
    calls: list[int] = []
    observe = MeasurePhase.do
    monkeypatch.setattr(MeasurePhase, "do", lambda self, e, t: calls.append(1) or observe(self, e, t))
    for x, expected in ((0.3, "some"), (0.5, "none"), (0.9, "none")):
        calls.clear()
        resident.show(planned(recipe(trio, "weight of ties", x)), "m")
        assert bool(calls) == (expected == "some"), x
    room = resident._recomputer._room
    assert any(key[0] == "values" for key in room._kept)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    nodes = []
    for i, name in enumerate("ab"):
        nodes.append(surgery.open(language_model(tmp_path / name, seed=i, tied=True)).node)
    resident = Resident()
    for alpha in (0.2, 0.6):
        subject = resident.show(make_plan(make(registry["lerp"], nodes, {"alpha": alpha})), "m")
    module = subject.module
    assert not resident.last.fresh
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    a, b = (compute(n.tensors["model.embed_tokens.weight"]) for n in nodes)
    assert torch.allclose(module.lm_head.weight, 0.4 * a + 0.6 * b, atol=1e-6)


def test_another_type_to_run_in_holds_the_rounded_weights(trio: Path, tmp_path: Path) -> None:
    resident = Resident(dtype="float32")
    for x in (0.2, 0.7):
        path = recipe(trio, "lerp", x)
        module = resident.show(planned(path), "m").module
    run(planned(path), tmp_path / "out", threads=1)
    for name, value in read_checkpoint(tmp_path / "out").items():
        assert module.state_dict()[name].dtype == torch.float32
        assert np.array_equal(module.state_dict()[name].numpy(), value.astype(np.float32)), name


def test_a_trial_that_fails_midway_leaves_nothing_believed(tmp_path: Path) -> None:
    good, bad = Net(), Net()
    torch.nn.init.constant_(bad.head.bias, 3.0)
    bad.head.bias.data[2] = float("inf")
    nodes = [surgery.open(write(m, tmp_path / n)).node for m, n in ((good, "good"), (bad, "bad"))]
    resident = Resident(build=lambda config: Net())
    resident.show(make_plan(nodes[0]), "good")
    with pytest.raises(Refused, match="infinity"):
        resident.show(make_plan(make(registry["lerp"], nodes, {"alpha": 0.5})), "mixed")
    module = resident.show(make_plan(nodes[0]), "good").module
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), good.parameters(), strict=True))


def test_files_that_changed_are_read_again(tmp_path: Path) -> None:
    resident = Resident(build=lambda config: Net())
    first, second = Net(), Net()
    folder = write(first, tmp_path / "m")
    resident.show(make_plan(surgery.open(folder).node), "m")
    (folder / "model.safetensors").unlink()
    folder.rmdir()
    write(second, folder)
    import os

    os.utime(folder / "model.safetensors", ns=(10**18, 10**18))
    module = resident.show(make_plan(surgery.open(folder).node), "m").module
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), second.parameters(), strict=True))


def test_what_a_model_fuses_is_built_anew(tmp_path: Path) -> None:
    """A module that keeps a tensor in another form has no place for it: correct all the same."""

    class Halved(Net):
        def load_state_dict(self, state, **options):
            return super().load_state_dict(state | {"head.bias": state["head.bias"] / 2}, **options)

    models = [Net(), Net()]
    nodes = [surgery.open(write(m, tmp_path / str(i))).node for i, m in enumerate(models)]
    resident = Resident(build=lambda config: Halved())
    resident.show(make_plan(nodes[0]), "0")
    module = resident.show(make_plan(nodes[1]), "1").module
    assert resident.last.fresh
    assert torch.equal(module.head.bias, models[1].head.bias / 2)


def test_prefixes_that_transformers_leaves_out(tmp_path: Path) -> None:
    from transformers import BertModel

    classifier(tmp_path / "c", ["x", "y"])
    body = BertModel.from_pretrained(tmp_path / "c", add_pooling_layer=True)
    body.save_pretrained(tmp_path / "body")
    resident = Resident()
    resident.show(surgery.open(tmp_path / "body").plan(), "body")
    resident.show((surgery.open(tmp_path / "body").map(lambda t: t * 2)).plan(), "twice")
    assert not resident.last.fresh and resident.last.tensors == len(body.state_dict())


def test_refusals(tmp_path: Path) -> None:
    nodes = [surgery.open(write(Net(), tmp_path / n)).node for n in "ab"]
    with pytest.raises(Refused, match="is a delta, no model"):
        Resident().show(make_plan(make(registry["diff"], nodes, {})), "d")
    with pytest.raises(Refused, match=r"(?s)no config.json.*--module"):
        Resident().show(make_plan(nodes[0]), "a")
    with pytest.raises(Refused, match="lacks `extra"):
        Resident(build=lambda c: torch.nn.ModuleDict({"extra": torch.nn.Linear(1, 1)})).show(make_plan(nodes[0]), "a")
    with pytest.raises(Refused, match="--device cuda:99: not to be had here"):
        Resident(device="cuda:99")
    folder = classifier(tmp_path / "c", ["x", "y"])
    with pytest.raises(Refused, match="lacks `classifier"):
        Resident().show(surgery.open(folder).drop("classifier.*").plan(), "c")


def test_tokens_tell_computations_apart(trio: Path) -> None:
    def tokens(name: str, x: object, dtype: str = "bfloat16") -> dict[str, str]:
        plan, made = planned(recipe(trio, name, x, dtype)), Tokens()
        return {p.name: made.program(p) for p in plan.programs}

    assert tokens("lerp", 0.2) == tokens("lerp", 0.2)
    assert not set(tokens("lerp", 0.2).values()) & set(tokens("lerp", 0.3).values())
    assert not set(tokens("lerp", 0.2).values()) & set(tokens("lerp", 0.2, "float16").values())
    assert not set(tokens("dare", 1).values()) & set(tokens("dare", 2).values())
    a, b = tokens("depth", 0.1), tokens("depth", 0.9)
    assert {n for n in a if a[n] == b[n]} == {n for n in a if "layers.1." in n or n in ("model.norm.weight", "lm_head.weight")}
    plans = [
        make_plan(make(registry["stock"], [surgery.open(trio / m).node for m in ("base", "a", "b")], {"granularity": "global"}))
    ]
    assert len({Tokens().program(p) for p in plans[0].programs}) == len(plans[0].programs)


def test_a_room_keeps_what_is_in_use() -> None:
    room = Room(100)
    room.put("a", np.zeros(60, np.uint8))
    room.put("b", np.zeros(60, np.uint8))  # does not fit, and a is in use
    assert room.get("a") is not None and room.get("b") is None
    for _ in range(3):
        room.next_trial()
    room.put("b", np.zeros(60, np.uint8))
    assert room.get("b") is not None and room.get("a") is None and room.used == 60


def test_memory_stays_in_its_bound(tmp_path: Path) -> None:
    rig_models = [surgery.open(write(Net(), tmp_path / n)).node for n in "ab"]
    resident = Resident(build=lambda config: Net(), memory=50_000)
    for alpha in (0.1, 0.2, 0.3):
        resident.show(make_plan(make(registry["slerp"], rig_models, {"t": alpha})), "m")
        assert resident._recomputer._room.used <= 50_000


def test_a_recipe_that_aligns_tokenizers_is_evaluated_with_the_tokenizer_it_would_write(tmp_path: Path) -> None:
    language_model(tmp_path / "a", seed=0)
    language_model(tmp_path / "b", seed=1)
    write_tokenizer(tmp_path / "b", [*WORDS[:4], *reversed(WORDS[4:])])  # the same words in other rows
    (tmp_path / "r.yaml").write_text(
        "models: {a: a, b: b}\nsteps:\n  m: {op: average, of: [a, b]}\noutput: {from: m, tokenizer: union}\n"
    )
    (tmp_path / "t.txt").write_text("the film was very good not a bad plot")
    (tmp_path / "tasks.yaml").write_text("tasks: {t: {kind: perplexity, test: t.txt}}")
    run(planned(tmp_path / "r.yaml"), tmp_path / "out", threads=1)
    found = lab.evaluate(tmp_path / "r.yaml", tmp_path / "tasks.yaml")["t"]
    assert found == lab.evaluate(tmp_path / "out", tmp_path / "tasks.yaml")["t"]
    resident = lab.Resident()
    for _ in range(2):
        subject = resident.show(planned(tmp_path / "r.yaml"), "m")
        assert subject.tokenizer("film")["input_ids"] != subject.tokenizer("good")["input_ids"]
    assert len(resident._tokenizers) == 1
