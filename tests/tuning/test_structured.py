"""SPT with its structured part: which matrices get a low-rank change, what that change is, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tuning_models import WORDS, live, place, record, same_bits, weights

from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.parts import Parts
from surgery.tuning.run import run
from surgery.tuning.settings import read_job
from surgery.tuning.structured import Adapters, split


def method(rank: int = 2, density: float = 0.2, **more: Any) -> dict[str, Any]:
    return {"spt": {"density": density, "structured": {"rank": rank, **more}}}


def test_the_choice_is_that_of_brute_force(home: Path) -> None:
    """Squared gradients in float64, the largest three tenths, and the paper's two rules, written out here."""
    _, before, fitted = live(home, method(density=0.3, beta=10), batch=15)
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").double()
    words = (home / "text.txt").read_text().split()
    ids = torch.tensor([WORDS.index(w) for w in words]).reshape(15, 16)
    base(input_ids=ids, labels=ids).loss.backward()
    inside = sorted(n for n in before if ".layers." in n)
    assert {n for n in inside if before[n].ndim == 1} == {n for n in before if "layernorm" in n}
    entries = sorted(((float(g), n, i) for n in inside for i, g in enumerate(base.get_parameter(n).grad.square().reshape(-1))),
                     reverse=True)  # fmt: skip
    count = round(0.3 * len(entries))
    assert entries[count - 1][0] > entries[count][0] * (1 + 1e-4)  # no tie: the choice is one
    found: dict[str, list[int]] = {n: [] for n in inside}
    for _, n, i in entries[:count]:
        found[n].append(i)
    adapted = [n for n in inside if before[n].ndim == 2 and len(found[n]) >= 2 * sum(before[n].shape) / 5]
    assert fitted.adapted == adapted and 3 < len(adapted) < len(inside) - 10
    assert set(fitted.masks) == set(inside) - set(adapted)
    vectors = 0
    for n, mask in fitted.masks.items():
        whole = before[n].ndim == 1 and len(found[n]) >= before[n].numel() / 10
        vectors += whole
        wanted = torch.zeros(before[n].numel(), dtype=torch.bool)
        wanted[list(range(before[n].numel())) if whole else found[n]] = True
        assert torch.equal(mask.reshape(-1), wanted), n
    assert vectors
    numbers = sum(2 * sum(before[n].shape) for n in adapted) + sum(int(m.sum()) for m in fitted.masks.values())
    assert fitted.entries == numbers and fitted.total == sum(p.numel() for p in before.values())


def test_what_is_not_trained_keeps_its_bits_and_changes_have_the_rank(home: Path) -> None:
    model, before, fitted = live(home, method(), batch=15)
    after = {n: p.detach() for n, p in model.named_parameters()}
    assert after.keys() == before.keys()  # the factors are gone
    for n, p in after.items():
        if n in fitted.adapted:
            values = torch.linalg.svdvals((p - before[n]).double())
            assert values[1] > 1e-6 and float(values[2]) < 1e-5 * float(values[0]), n
        elif n in fitted.masks:
            assert same_bits(p[~fitted.masks[n]], before[n][~fitted.masks[n]]), n
        else:
            assert same_bits(p, before[n]), n
    assert any(bool((after[n] != before[n])[m].any()) for n, m in fitted.masks.items() if m.any())


def test_without_it_all_is_as_it_was(home: Path) -> None:
    _, before, fitted = live(home, {"spt": {"density": 0.2}}, batch=15)
    assert not fitted.adapted and set(fitted.masks) == {n for n in before if "_proj" in n}
    _, _, null = live(home, {"spt": {"density": 0.2, "structured": None}}, batch=15)
    assert all(torch.equal(null.masks[n], m) for n, m in fitted.masks.items())


@pytest.mark.parametrize(
    "counts, rank, adapted",
    [((11, 12), 2, []), ((12, 12), 2, ["a"]), ((0, 0), 1, []), ((12, 36), 2, ["a"]), ((36, 36), 5, ["a"])],
)
def test_the_threshold_is_what_the_adapter_has_over_alpha(counts: tuple[int, int], rank: int, adapted: list[str]) -> None:
    """a: (12, 18), 30 rank numbers; an expert stack of three (3, 4, 9) counts as (12, 9)."""
    a, b = torch.zeros(216, dtype=torch.bool), torch.zeros(3 * 4 * 9, dtype=torch.bool)
    a[: counts[0]], b[: counts[1]] = True, True
    masks = {"a": a.reshape(12, 18), "b": b.reshape(3, 4, 9), "v": torch.arange(10) < 2, "w": torch.arange(10) < 1}
    kept, found = split(masks, ["a", "b"], rank=rank, alpha=5.0, beta=5.0)
    expected = [*adapted, *(["b"] if counts[1] * 5 >= rank * 21 else [])]
    assert found == expected and set(kept) == set(masks) - set(found)
    assert kept["v"].all() and kept["w"].sum() == 1


def test_the_factors_gradients_are_those_of_differentiation() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    start, x = net[0].weight.detach().clone(), torch.randn(4, 5).double()
    made = Adapters(Parts(net), ["0.weight"], rank=2, scale=0.7, seed=3)
    a, b = made.parameters["0.weight.lora_A"], made.parameters["0.weight.lora_B"]
    assert a.shape == (2, 5) and float(a.detach().abs().max()) <= 5**-0.5 and not b.any()
    assert len(made) == 24 and {id(a), id(b)} <= {id(p) for p in net.parameters()}
    made.fold()
    assert torch.equal(net[0].weight, start)
    with torch.no_grad():
        b.copy_(torch.randn(7, 2))
    made.fold()
    net(x).square().sum().backward()
    made.on_gradients()
    fa, fb = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    hidden = torch.tanh(x @ (start + 0.7 * fb @ fa).T + net[0].bias)
    (hidden @ net[2].weight.T + net[2].bias).square().sum().backward()
    torch.testing.assert_close(a.grad, fa.grad)
    torch.testing.assert_close(b.grad, fb.grad)
    assert net[0].weight.grad is None
    made.release()
    assert set(dict(net.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(net[0].weight.detach(), start + 0.7 * b.detach() @ a.detach())


def job(home: Path, model: str = "bert16", **said: Any) -> Any:
    task = {"kind": "classification", "train": str(home / "train.csv"), "validation": str(home / "train.csv")}
    plain = {"model": str(home / model), "task": task, "epochs": 2, "lr": 0.01, "batch": 8, "method": method()}
    return read_job(plain | said, place)


def test_one_checkpoint_or_one_package_that_loads(home: Path, tmp_path: Path) -> None:
    import surgery

    report = run(job(home), str(tmp_path / "whole"))
    adapted = record(tmp_path / "whole")["trained"]["adapted"]
    assert adapted == report.fitted.adapted and adapted
    before, after = weights(home / "bert16"), weights(tmp_path / "whole")
    assert {n.removeprefix("bert.") for n in after} >= set(before) and not any("lora" in n or "surgery" in n for n in after)
    for n, value in before.items():
        mask = report.fitted.masks.get(f"bert.{n}")
        now = after[f"bert.{n}"]
        if f"bert.{n}" in adapted:
            assert now.dtype == torch.bfloat16 and bool((now != value).any())
        else:
            kept = torch.ones_like(value, dtype=torch.bool) if mask is None else ~mask
            assert same_bits(now[kept], value[kept]), n
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert torch.equal(loaded.get_parameter(adapted[0]), after[adapted[0]])
    run(job(home, output="delta"), str(tmp_path / "d.safetensors"))
    again = surgery.open(str(tmp_path / "d.safetensors"), base=str(home / "bert16"))
    assert all(same_bits(again[n].compute(), value) for n, value in after.items())


@pytest.mark.parametrize("average", [None, {"elastic": {"every": 2, "decay": 0.5}}, {"ema": {"decay": 0.8}}])
def test_a_resumed_run_leaves_the_same_bytes(home: Path, tmp_path: Path, average: Any) -> None:
    said: dict[str, Any] = {"model": "bert", "average": average, "regularise": {"l2_sp": 0.1}, "layer_decay": 0.9}

    def stop(step: int, total: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    run(job(home, **said), str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(job(home, **said), str(tmp_path / "cut"), progress=stop)
    torch.manual_seed(99)
    run(job(home, **said), str(tmp_path / "cut"), resume=True)
    for name in ("model.safetensors", "tune.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_it_learns(digits: dict[str, torch.Tensor]) -> None:
    """On the digits: most of what a full run gains, with a sixteenth of its numbers (and a higher rate), from Python."""
    from lab_rig import Net, domains

    images, labels = domains()["rot90"]["train"]
    data = [(torch.from_numpy(x), torch.tensor(y)) for x, y in zip(images, labels, strict=True)]
    x, y = (torch.from_numpy(a) for a in domains()["rot90"]["test"])
    found = {}
    for name, way, lr in (("full", "full", 2e-3), ("spt", method(4, 0.05), 1e-2)):
        net = Net()
        net.base_model_prefix = ""
        net.load_state_dict(digits)
        made = tune(net, data, loss=torch.nn.functional.cross_entropy, method=way, lr=lr, steps=120, batch=64, seed=1)
        with torch.inference_mode():
            found[name] = float((net.eval()(x).argmax(1) == y).float().mean()), made
    before = Net()
    before.load_state_dict(digits)
    start = float((before(x).argmax(1) == y).float().mean())
    assert found["spt"][1].adapted and found["spt"][1].entries * 16 < found["full"][1].entries
    assert found["spt"][0] >= start + 0.6 * (found["full"][0] - start)


@pytest.mark.parametrize(
    "said, problem",
    [
        ({"method": {"spt": {"structured": {}}}}, "method.spt.structured: method.spt.structured needs `rank`"),
        ({"method": {"spt": {"structured": {"rank": 0}}}}, "method.spt.structured.rank: .* less than the minimum of 1"),
        ({"method": {"spt": {"structured": {"rank": 2, "alpa": 3}}}}, "unknown key `alpa` .*\nhint: did you mean `alpha`"),
        ({"method": method(), "average": "stock"}, "stock merges whole models, which spt's low-rank changes are not"),
        ({"method": method(), "fast_forward": {}}, "fast_forward: repeats updates of weights"),
    ],
)
def test_settings_that_are_wrong(home: Path, said: dict[str, Any], problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        job(home, **said)
