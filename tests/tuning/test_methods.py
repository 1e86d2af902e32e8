"""What each method trains and what it leaves alone, to the bit, through a whole run from a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tuning_models import WORDS, live, place, record, same_bits, weights

from surgery.errors import Refused
from surgery.tuning.masks import Masks, entries_of, largest, principal
from surgery.tuning.parts import Parts
from surgery.tuning.run import run
from surgery.tuning.settings import read_job


def go(home: Path, out: Path, model: str = "bert", **said: Any) -> Path:
    task = {"kind": "classification", "train": str(home / "train.csv")}
    if model in ("llama", "tied"):
        task = {"kind": "causal", "train": str(home / "text.txt"), "length": 16}
    rest = {"epochs": 2, "lr": 0.01, "batch": 8, "weight_decay": 0.1} | said
    run(read_job({"model": str(home / model), "task": task, **rest}, place), str(out), overwrite=True)
    return out


def moved(home: Path, out: Path, model: str = "bert") -> tuple[set[str], set[str]]:
    """(names that differ from the base, names that have its bits); new ones are in neither."""
    before, after = weights(home / model), weights(out)
    common = {n: (before[n], after[m]) for n in before for m in after if m == n or m == f"bert.{n}"}
    same = {n for n, (a, b) in common.items() if same_bits(a, b)}
    return set(common) - same, same


def test_full_moves_everything_that_has_a_gradient(home: Path, tmp_path: Path) -> None:
    changed, same = moved(home, go(home, tmp_path / "o"))
    assert not same
    assert "encoder.layer.0.attention.self.query.weight" in changed and "embeddings.word_embeddings.weight" in changed


def test_head_only(home: Path, tmp_path: Path) -> None:
    changed, same = moved(home, go(home, tmp_path / "o", method="head"))
    assert not changed and len(same) > 40
    kept = moved(home, go(home, tmp_path / "p", "llama", method="head"), "llama")
    assert kept[0] == {"lm_head.weight"}
    with pytest.raises(Refused, match="embeddings"):
        go(home, tmp_path / "q", "tied", method="head")


def test_last_and_frozen_blocks(home: Path, tmp_path: Path) -> None:
    changed, same = moved(home, go(home, tmp_path / "o", "llama", method={"last": 1}), "llama")
    assert changed == {n for n in changed | same if ".layers.2." in n or n in ("model.norm.weight", "lm_head.weight")}
    low, kept = moved(home, go(home, tmp_path / "p", "llama", method={"frozen": 2}), "llama")
    assert (low, kept) == (changed, same)
    with pytest.raises(Refused, match="4 blocks, but the model has 3"):
        go(home, tmp_path / "q", "llama", method={"last": 4})


def test_bitfit_moves_biases_and_a_new_head(home: Path, tmp_path: Path) -> None:
    out = go(home, tmp_path / "o", method="bitfit")
    changed, same = moved(home, out)
    assert all(n.endswith("bias") for n in changed) and not any(n.endswith(".bias") for n in same)
    assert record(out)["trained"]["new"] == ["classifier.bias", "classifier.weight"]
    with pytest.raises(Refused, match="no biases"):
        go(home, tmp_path / "p", "llama", method="bitfit")


def test_half_is_half_of_every_kind(home: Path, tmp_path: Path) -> None:
    changed, same = moved(home, go(home, tmp_path / "o", "llama", method="half"), "llama")
    blocks = [f".layers.{i}." for i in range(3)]
    for block in blocks:
        for kind, size in {"self_attn": 2, "norm": 1}.items():
            assert len([n for n in same if block in n and kind in n]) == size
    frozen = [len([n for n in same if b in n and "mlp" in n]) for b in blocks]
    assert frozen == [1, 2, 1]  # of three: one, two, one
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= changed
    again = moved(home, go(home, tmp_path / "p", "llama", method="half", lr=0.02), "llama")
    other = moved(home, go(home, tmp_path / "q", "llama", method={"half": {"seed": 7}}), "llama")
    assert again[1] == same and other[1] != same


def test_frozen_tensors_keep_bits_in_bfloat16(home: Path, tmp_path: Path) -> None:
    out = go(home, tmp_path / "o", "bert16", method={"last": 1})
    changed, same = moved(home, out, "bert16")
    assert changed and all("layer.2." in n or "pooler" in n for n in changed)
    assert len(same) > 25 and {t.dtype for t in weights(out).values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


# -- masks on entries --------------------------------------------------------------------------------------------------------


def check_masked(model: Any, before: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
    """Entries outside masks have the bits from before; of those inside nearly all have moved."""
    inside = moved_inside = 0
    for name, p in model.named_parameters():
        mask = masks.get(name)
        if mask is None:
            continue
        after = p.detach()
        assert same_bits(after[~mask], before[name][~mask]), name
        inside += int(mask.sum())
        moved_inside += int((after != before[name])[mask].sum())
    assert inside and moved_inside > 0.9 * inside


def test_lt_sft_trains_the_entries_that_moved_furthest_from_the_start(home: Path) -> None:
    model, before, fitted = live(home, {"lt_sft": {"density": 0.1}})
    check_masked(model, before, fitted.masks)
    dense, start, _ = live(home, "full")
    norms = {n for n in before if "norm" in n}
    moves = {n: (p.detach() - start[n]).abs() for n, p in dense.named_parameters() if n not in norms and n != "lm_head.weight"}
    flat = torch.cat([m.reshape(-1) for m in moves.values()])
    count = round(0.1 * len(flat))
    assert set(fitted.masks) == set(moves) and sum(int(m.sum()) for m in fitted.masks.values()) == count
    chosen = torch.cat([fitted.masks[n].reshape(-1) for n in moves])
    # norms were trained in the full run above and not in the method's own: the choice is nearly, not exactly, the same
    assert (torch.zeros(len(flat), dtype=torch.bool).index_fill(0, flat.topk(count).indices, True) & chosen).sum() > 0.6 * count
    for name, p in model.named_parameters():
        if name in norms:
            assert same_bits(p.detach(), before[name])
    assert not same_bits(model.lm_head.weight.detach(), before["lm_head.weight"])
    assert fitted.phases["choosing"] and fitted.entries == count + before["lm_head.weight"].numel()


def test_lt_sft_choice_is_exact_where_all_is_trained(home: Path) -> None:
    _, _, fitted = live(home, {"lt_sft": {"density": 0.1, "norms": True}})
    dense, start, _ = live(home, "full")
    moves = {n: (p.detach().double() - start[n].double()).abs() for n, p in dense.named_parameters() if n != "lm_head.weight"}
    flat = torch.cat([moves[n].reshape(-1) for n in sorted(moves)])
    chosen = torch.cat([fitted.masks[n].reshape(-1) for n in sorted(moves)])
    assert flat[chosen].min() >= flat[~chosen].max() - 1e-7


def test_lift_trains_the_largest_of_the_low_rank_approximation(home: Path) -> None:
    model, before, fitted = live(home, {"lift": {"rank": 2, "density": 0.2}})
    check_masked(model, before, fitted.masks)
    matrices = {n for n in before if "_proj" in n}
    assert set(fitted.masks) == matrices
    for name in matrices:
        u, s, vh = torch.linalg.svd(before[name].double())
        near = ((u[:, :2] * s[:2]) @ vh[:2]).abs()
        mask, count = fitted.masks[name], round(0.2 * near.numel())
        assert int(mask.sum()) == count
        assert near[mask].min() > near[~mask].max()
    for name, p in model.named_parameters():
        if name not in matrices:
            assert same_bits(p.detach(), before[name])


def test_lift_renews_its_choice_and_keeps_what_was_trained(home: Path) -> None:
    model, before, fitted = live(home, {"lift": {"rank": 2, "density": 0.2, "every": 2}}, lr=0.05)
    ever = {n: p.detach() != before[n] for n, p in model.named_parameters() if n in fitted.masks}
    more = sum(int(e.sum()) for e in ever.values())
    now = sum(int(m.sum()) for m in fitted.masks.values())
    assert more > now  # some entries were trained under an earlier mask and kept their values since


def test_equal_seeds_give_equal_adapters_whatever_was_drawn_before() -> None:
    """From Python, too: factors must not depend on how far torch's own generator has got in this process."""
    from surgery.tuning import tune

    def adapter(drawn: int, seed: int) -> dict[str, torch.Tensor]:
        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (i + 1))
        data = [(torch.tensor([i % 3, i % 5, i % 7, 1.0]), i % 2) for i in range(12)]
        torch.rand(drawn)  # somebody else's
        said = {"lora": {"r": 2, "target_modules": ["0", "1"]}}
        made = tune(net, data, loss=torch.nn.functional.cross_entropy, method=said, steps=3, lr=0.1, seed=seed, device="cpu")
        return {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora_" in n}

    first, second, other = adapter(1, 5), adapter(1000, 5), adapter(1, 6)
    assert len(first) == 4 and all(torch.equal(v, second[n]) for n, v in first.items())
    assert not all(torch.equal(v, other[n]) for n, v in first.items())


def test_lift_budget_counts_as_lora_does(home: Path) -> None:
    assert entries_of((8, 12), density=0.05, budget=3) == 60
    assert entries_of((8, 12), density=0.05, budget=100) == 96
    assert entries_of((2, 4, 12), density=0.5, budget=None) == 48
    _, _, fitted = live(home, {"lift": {"budget": 1}}, epochs=1)
    assert all(int(m.sum()) == m.shape[0] + m.shape[1] for m in fitted.masks.values())


def test_lift_moments_survive_where_an_entry_stays() -> None:
    from surgery.tuning.methods import Principal

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False)

    torch.manual_seed(3)
    module = Two()
    parts = Parts(module)
    masks = Masks(parts.parameters)
    choice = Principal(parts, masks, {"rank": 1, "density": 0.5, "every": 1})
    optimizer = torch.optim.AdamW(module.parameters())
    choice.on_step_begin(0, optimizer)
    old = masks.get("first.weight").clone()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        module.first.weight.copy_(torch.randn(4, 4))
    choice.on_step_begin(1, optimizer)
    new = masks.get("first.weight")
    moment = optimizer.state[module.first.weight]["exp_avg"]
    assert bool((new != old).any())
    assert torch.equal(moment != 0, new & old)


def test_sara_trains_small_entries_only(home: Path) -> None:
    model, before, fitted = live(home, {"sara": {"threshold": 0.01}})
    check_masked(model, before, fitted.masks)
    for name, mask in fitted.masks.items():
        assert torch.equal(mask, before[name].abs() < 0.01)
    with pytest.raises(Refused, match="no entry is smaller"):
        live(home, {"sara": {"threshold": 1e-12}})


def test_spt_trains_the_most_sensitive_entries(home: Path) -> None:
    model, before, fitted = live(home, {"spt": {"density": 0.1}}, batch=15)
    check_masked(model, before, fitted.masks)
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").double()
    words = (home / "text.txt").read_text().split()
    ids = torch.tensor([WORDS.index(w) for w in words]).reshape(15, 16)
    base(input_ids=ids, labels=ids).loss.backward()
    squares = torch.cat([base.get_parameter(n).grad.square().reshape(-1) for n in sorted(fitted.masks)])
    chosen = torch.cat([fitted.masks[n].reshape(-1) for n in sorted(fitted.masks)])
    assert set(fitted.masks) == {n for n in before if "_proj" in n}
    assert int(chosen.sum()) == round(0.1 * len(squares))
    assert squares[chosen].min() >= squares[~chosen].max() * (1 - 1e-5)


def test_masks_hold_against_decay_momentum_and_nan_gradients() -> None:
    w = torch.nn.Parameter(torch.randn(3, 5))
    start = w.detach().clone()
    mask = torch.rand(3, 5) < 0.5
    masks = Masks({"w": w})
    masks.set("w", mask)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        w.grad = torch.where(mask, torch.ones(3, 5), torch.full((3, 5), torch.nan))
        masks.on_gradients()
        optimizer.step()
        masks.on_update()
    assert same_bits(w.detach()[~mask], start[~mask]) and bool((w.detach() != start)[mask].all())


def test_largest_takes_exactly_so_many_and_the_first_of_equals() -> None:
    values = {"a": torch.tensor([[1.0, 2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, 3.0]), "c": torch.tensor(2.0)}
    made = largest(values, 3)
    assert made["a"].tolist() == [[False, True], [True, False]] and made["b"].tolist() == [False, True]
    assert made["c"].tolist() is False
    assert not any(m.any() for m in largest(values, 0).values())
    assert all(m.all() for m in largest(values, 99).values())
    assert largest({}, 3) == {}
    assert largest({"a": torch.empty(0, 3)}, 2)["a"].shape == (0, 3)


def test_principal_of_a_large_matrix_is_that_of_its_factors() -> None:
    torch.manual_seed(0)
    low = (torch.randn(1100, 4) @ torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0]))) @ torch.randn(4, 1030)
    count = 5000
    mask = principal(low + 1e-4 * torch.randn_like(low), 4, count)
    exact = low.abs().reshape(-1).topk(count).indices
    assert int(mask.sum()) == count and int(mask.reshape(-1)[exact].sum()) > 0.99 * count
    state = torch.random.get_rng_state()
    assert torch.equal(principal(low, 4, count), principal(low, 4, count))
    assert torch.equal(state, torch.random.get_rng_state())
