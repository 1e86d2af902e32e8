"""Averages and pulls against the formulas, recomputed in float64 from the states that a run went through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from surgery.errors import Failed, Refused
from surgery.tuning import tune
from surgery.tuning.averages import Stock
from surgery.tuning.regularise import Mixout, Pull, clip_each

Array = np.ndarray


class Net(torch.nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(4, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(6) if norm else torch.nn.Identity()
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


def data(count: int = 24) -> list[tuple[torch.Tensor, int]]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(count, 4, generator=draw)
    return [(v, int(v[:3].argmax())) for v in x]


def net(norm: bool = False) -> Net:
    torch.manual_seed(1)
    return Net(norm)


def trace(model: Net, **settings: Any) -> tuple[list[dict[str, Array]], Any]:
    """(states in float64: at the start, then after every step before anything else touches them; what tune returned)"""
    states = [flat(model)]
    settings = {"epochs": 3, "batch": 8, "lr": 0.02, "loss": torch.nn.functional.cross_entropy} | settings
    made = tune(model, data(), progress=lambda *_: states.append(flat(model)), **settings)
    return states, made


def flat(model: Any) -> dict[str, Array]:
    return {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}


def close(model: Net, expected: dict[str, Array], tolerance: float = 2e-6) -> None:
    for name, value in flat(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("debias", [False, True])
def test_ema(debias: bool) -> None:
    model = net()
    states, _ = trace(model, average={"ema": {"decay": 0.7, "debias": debias}})
    weights = [0.7 ** (9 - t) * (0.3 if t else 1.0) for t in range(10)]
    if debias:
        weights[0] = 0.0
    assert len(states) == 10
    total = sum(weights)
    assert debias or total == pytest.approx(1)
    close(model, {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / total for n in states[0]})


def test_swa_takes_the_ends_of_late_epochs() -> None:
    model = net()
    states, _ = trace(model, average={"swa": {"start": 0.4}}, epochs=4, schedule="constant")
    picked = [states[6], states[9], states[12]]  # three steps an epoch; 0.4 of 12 is 4.8
    close(model, {n: np.mean([s[n] for s in picked], axis=0) for n in states[0]})
    model = net()
    states, _ = trace(model, average={"swa": {"start": 0.0, "every": 2}}, epochs=2)
    close(model, {n: np.mean([states[t][n] for t in (2, 4, 6)], axis=0) for n in states[0]})


def test_swa_measures_batch_norms_anew() -> None:
    model = net(norm=True)
    trace(model, average={"swa": {"start": 0.0}})
    xs = torch.stack([x for x, _ in data()])
    seen = []
    hook = model.norm.register_forward_hook(lambda m, i, o: seen.append(i[0].detach().double()))
    model.eval()
    model(xs)
    hook.remove()
    np.testing.assert_allclose(model.norm.running_mean.double(), seen[0].mean(0), atol=1e-6)
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize("reset", [True, False])
def test_elastic_goes_to_its_average_and_starts_that_again(reset: bool) -> None:
    model = net()
    states, _ = trace(model, average={"elastic": {"decay": 0.5, "every": 4, "reset_optimizer": reset}}, schedule="constant", lr=0.01)
    for last in (4, 8):
        average = states[0]  # again after the first reset
        for t in range(last - 3, last + 1):
            average = {n: 0.5 * average[n] + 0.5 * states[t][n] for n in average}
        steps = np.concatenate([np.abs(states[last + 1][n] - average[n]).ravel() for n in average])
        # AdamW's first step moves every entry by lr; a later one by less
        assert np.all(steps <= 0.011)
        assert np.median(steps) == pytest.approx(0.01, rel=1e-3) if reset else np.median(steps) < 0.0099
    close(model, states[9], 0.0)


def test_stock_merges_after_every_epoch() -> None:
    model = net()
    states, made = trace(model, average={"stock": {"runs": 2}}, epochs=2)
    assert len(states) == 13 and len(made.history) == 4  # 2 epochs x 2 runs x 3 steps

    def merged(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        out = {}
        for n, base in states[0].items():
            u, v = (a[n] - base).ravel(), (b[n] - base).ravel()
            cosine = u @ v / np.sqrt((u @ u) * (v @ v))
            t = np.clip(2 * cosine / (1 + cosine), 0, 1)
            out[n] = t * (a[n] + b[n]) / 2 + (1 - t) * base
        return out

    first = merged(states[3], states[6])
    close(model, merged(states[9], states[12]), 1e-5)
    for start in (states[7], states[10]):  # both go on from the merge, one step of at most lr (1.0 of Adam's unit) away
        for n in first:
            assert np.abs(start[n] - first[n]).max() < 0.06
    # the second run of an epoch starts where the first did, not where that ended
    for n in first:
        assert np.abs(states[4][n] - states[0][n]).max() < 0.021
        assert np.abs(states[10][n] - first[n]).max() < np.abs(states[9][n] - first[n]).max()


def test_stock_runs_have_the_same_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    monkeypatch.setattr(Stock, "on_step", lambda self, step, total, o: rates.append(o.param_groups[0]["lr"]))
    trace(net(), average={"stock": {"runs": 2}}, epochs=2, lr=0.6)
    # set after each step for the next one: six steps down from 0.6, each epoch's three gone through twice
    assert rates == pytest.approx([0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.3, 0.2, 0.1, 0.0])


def test_stock_keeps_moments_apart() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([p])
    stock = Stock({"p": p}, runs=2)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0):
        seen.append(optimizer.state[p]["mark"] if optimizer.state.get(p) else None)
        optimizer.state[p]["mark"] = value
        with torch.no_grad():
            p.add_(value)
        stock.on_epoch(0, 0, optimizer)
    assert seen == [None, None, 1.0, 2.0]


def test_l2_sp_gradient_is_that_of_its_penalty() -> None:
    p = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    q = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    pull = Pull({"p": p, "q": q}, 0.3)
    start = [p.detach().clone(), q.detach().clone()]
    with torch.no_grad():
        p.add_(torch.randn(3, 4, dtype=torch.float64))
    loss = p.square().sum()
    loss.backward()
    pull.on_gradients(0)
    own, other = (x.detach().clone().requires_grad_() for x in (p, q))
    (own.square().sum() + 0.3 * ((own - start[0]).square().sum() + (other - start[1]).square().sum())).backward()
    torch.testing.assert_close(p.grad, own.grad)
    torch.testing.assert_close(q.grad, other.grad)
    assert pull.value() == pytest.approx(0.3 * float((own - start[0]).detach().square().sum()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_l2_sp_in_a_run_is_the_step_of_the_whole_loss(accumulate: int) -> None:
    model, twin = net(), net()
    settings = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "epochs": 2, "batch": 24 // accumulate}
    trace(model, regularise={"l2_sp": 0.5, "clip": 0}, accumulate=accumulate, **settings)
    start = [p.detach().clone() for p in twin.parameters()]
    x, y = torch.stack([x for x, _ in data()]), torch.tensor([y for _, y in data()])
    for _ in range(2):
        twin.zero_grad()
        pull = sum((p - s).square().sum() for p, s in zip(twin.parameters(), start, strict=True))
        (torch.nn.functional.cross_entropy(twin(x), y) + 0.5 * pull).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.1 * p.grad
    close(model, flat(twin))


def test_mixout_is_the_formula_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(200, 300, dtype=torch.float64)
    start = layer.weight.detach().clone()
    mixout = Mixout(layer, dict(layer.named_parameters()), 0.7)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    change = layer.weight.detach() - start
    x = torch.randn(7, 200, dtype=torch.float64)
    with mixout.mixed():
        mixed = layer.weight.detach().clone()
        out = layer(x).sum()
        out.backward()
    ratio = (mixed - start) / change
    kept = ratio.abs() > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.3))
    torch.testing.assert_close(mixed[~kept], start[~kept])
    assert kept.double().mean() == pytest.approx(0.3, abs=0.01)
    dense = x.sum(0).expand(300, 200)
    torch.testing.assert_close(layer.weight.grad, torch.where(kept, dense / 0.3, torch.zeros_like(dense)))
    assert isinstance(layer.weight, torch.nn.Parameter)


def test_mixout_with_no_chance_is_no_mixout() -> None:
    a, _ = trace(net(), regularise={"mixout": 0.0})
    b, _ = trace(net())
    c, _ = trace(net(), regularise={"mixout": 0.5})
    assert all(np.array_equal(a[-1][n], b[-1][n]) for n in a[-1])
    assert not np.array_equal(a[-1]["head.weight"], c[-1]["head.weight"])


def test_clip_each() -> None:
    p, q, r = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    p.grad, q.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    clip_each({"p": p, "q": q, "r": r}, 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(q.grad, torch.tensor([0.3, 0.4]))
    q.grad = torch.zeros(2)
    clip_each({"q": q}, 1.0)
    assert q.grad.tolist() == [0, 0]


def test_layer_decay_scales_the_first_step() -> None:
    model = net()
    states, _ = trace(model, layer_decay=0.5, steps=1, lr=0.01, schedule="constant")
    scale = {n.rpartition(".")[0]: float(np.abs(states[1][n] - states[0][n]).max()) for n in states[0]}
    assert scale == pytest.approx({"stem": 0.0025, "blocks.0": 0.005, "blocks.1": 0.01, "head": 0.01}, rel=1e-3)


def test_label_smoothing_and_own_losses() -> None:
    model = net()
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    _, made = trace(model, loss=smooth, epochs=1, batch=24)
    twin = net()
    x, y = torch.stack([x for x, _ in data()]), torch.tensor([y for _, y in data()])
    assert made.history[0]["loss"] == pytest.approx(float(smooth(twin(x), y).detach()), rel=1e-6)
    with pytest.raises(Refused, match="belongs into the loss"):
        trace(net(), regularise={"label_smoothing": 0.2})


def test_methods_on_a_module_of_ones_own() -> None:
    model = net()
    before = flat(model)
    _, made = trace(model, method="half", epochs=1)
    same = {n for n, v in flat(model).items() if np.array_equal(v, before[n])}
    assert same and same == {n for n in before if n.startswith("blocks.")} - set(made.trained)
    model = net()
    _, made = trace(model, method="head", epochs=1)
    assert made.trained == ["head.weight", "head.bias"]


def test_validation_and_metrics() -> None:
    made = tune(net(), data(), validation=data(10), loss=torch.nn.functional.cross_entropy, epochs=2,
                metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())})  # fmt: skip
    assert {"validation_loss", "validation_accuracy"} <= made.history[-1].keys()
    assert made.final["validation_loss"] == made.history[-1]["validation_loss"]


def test_a_loss_that_is_not_finite_stops_before_it_does_harm() -> None:
    model, states = net(), []
    rows = data()
    calls = 0

    def loss(out: Any, y: Any) -> Any:
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(out, y) * (float("nan") if calls == 5 else 1.0)

    with pytest.raises(Failed, match="step 5: the loss is nan"):
        tune(model, rows, loss=loss, batch=8, epochs=3, progress=lambda *_: states.append(flat(model)))
    assert len(states) == 4
    close(model, states[-1], 0.0)


def test_a_gradient_that_is_not_finite_stops_as_well() -> None:
    model = net()
    before = flat(model)

    def loss(out: Any, y: Any) -> Any:
        return torch.sqrt(out.sum() * 0)  # 0, with an infinite derivative times 0

    with pytest.raises(Failed, match="a gradient is not finite"):
        tune(model, data(), loss=loss)
    close(model, before, 0.0)


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(Refused, match="no examples"):
        tune(net(), [], loss=torch.nn.functional.cross_entropy)
    with pytest.raises(Refused, match="give a loss"):
        tune(net(), data())
    with pytest.raises(Refused, match="float32"):
        tune(net().half(), data(), loss=torch.nn.functional.cross_entropy)
    with pytest.raises(Refused, match=r"no token embeddings"):
        tune(net(), data(), loss=torch.nn.functional.cross_entropy, regularise={"neftune": 5})
    with pytest.raises(Refused, match="without a folder"):
        tune(net(), data(), loss=torch.nn.functional.cross_entropy, resume=True)
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="no CUDA device"):
            tune(net(), data(), loss=torch.nn.functional.cross_entropy, device="cuda")


def test_adapters_on_a_module_of_ones_own() -> None:
    model = net()
    before = flat(model)
    made = tune(model, data(), loss=torch.nn.functional.cross_entropy, epochs=2, lr=0.05, average={"ema": {"decay": 0.5}},
                method={"lora": {"r": 2, "target_modules": ["stem", "blocks.1"]}})  # fmt: skip
    assert made.trained and all("lora_" in n for n in made.trained)
    merged = made.model.merge_and_unload()
    moved = {n for n, v in flat(merged).items() if not np.array_equal(v, before[n])}
    assert moved == {"stem.weight", "blocks.1.weight"}
    with pytest.raises(Refused, match="peft has no `LORRA`"):
        tune(net(), data(), loss=torch.nn.functional.cross_entropy, method={"lora": {"peft_type": "lorra"}})


def test_a_module_that_returns_its_loss_and_dict_items() -> None:
    class Own(Net):
        def forward(self, x: Any, labels: Any, **more: Any) -> Any:
            out = super().forward(x)
            return {"loss": torch.nn.functional.cross_entropy(out, labels), "logits": out}

    torch.manual_seed(1)
    items = [{"x": x, "labels": torch.tensor(y)} for x, y in data()]
    a, b, c = Own(), net(), net()
    a.load_state_dict(b.state_dict())

    def stack(rows: Any) -> dict[str, Any]:
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    how = {"epochs": 2, "batch": 4, "accumulate": 2, "lr": 0.01}
    tune(a, items, collate=stack, **how)
    tune(b, data(), loss=torch.nn.functional.cross_entropy, **how)
    assert all(np.array_equal(v, flat(b)[n]) for n, v in flat(a).items())
    tune(c, data(), loss=torch.nn.functional.cross_entropy, epochs=2, batch=8, lr=0.01)
    close(c, flat(b), 1e-4)  # two batches of four are one of eight
