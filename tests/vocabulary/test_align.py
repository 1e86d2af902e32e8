"""Rows of aligned models against alignment done over with dicts and loops; what is copied is copied to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BF16, bits, llama_config, plan, read_checkpoint, recipe, run, write_checkpoint, write_file
from vocab_models import HIDDEN, TABLES, model, reference, vocab_of, word_level

import surgery
from surgery import Refused
from surgery.engine.plan import make_plan
from surgery.vocabulary import AlignedNode, Policy, align

WORDS = ["<unk>", "the", "cat", "sat", "on", "mat"]


def aligned(folder: Path, names: str, tokenizer: Any, **options: Any) -> list[Any]:
    return surgery.align([surgery.open(folder / n, name=n) for n in names], tokenizer=tokenizer, **options)


def tables(checkpoint: Any, name: str) -> np.ndarray:
    return checkpoint[name].compute().double().numpy()


def stored(folder: Path, name: str) -> np.ndarray:
    return read_checkpoint(folder)[name]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """base, a (moved, one more), b (other words, an added token that a has too)."""
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", ["<unk>", "mat", "cat", "the", "dog"], 1, added=[("<a>", True), ("<both>", False)])
    model(tmp_path / "z", ["<unk>", "cat", "bird", "on"], 2, added=[("<both>", False), ("<b>", True)])
    return tmp_path


@pytest.mark.parametrize("policy", ["union", "base", "x", "y", "z"])
def test_rows_are_those_of_the_reference(three: Path, policy: str) -> None:
    made = aligned(three, "xyz", policy)
    vocabs = [vocab_of(three / n) for n in "xyz"]
    donor = "xyz".index(policy) if policy in "xyz" else 0
    out = made[0].node.vocabulary.ids if policy == "union" else vocabs[donor]
    if policy == "union":
        assert out == vocabs[0] | {"dog": 6, "bird": 7, "<a>": 8, "<both>": 9, "<b>": 10}
    for name in TABLES:
        read = [stored(three / n, name) for n in "xyz"]
        rows = max(max(out.values()) + 1, len(read[donor]))
        for got, wanted in zip(made, reference(read, vocabs, out, rows, donor=donor), strict=True):
            table = tables(got, name)
            assert table.shape == (rows, HIDDEN)
            np.testing.assert_array_equal(table, wanted.astype(BF16).astype(np.float64))  # rounded once, if at all
    for got in made:  # all else is untouched
        assert {n for n in got if n not in TABLES} == {n for n in made[0] if n not in TABLES}
    assert all(c.config["vocab_size"] == tables(c, TABLES[0]).shape[0] for c in made)


def test_the_same_rows_in_another_order_come_back_to_the_bit(tmp_path: Path) -> None:
    """Equal sizes, other ids: NaN payloads, negative zeros and all."""
    ids = {w: i for i, w in enumerate(WORDS)}
    turned = {w: (i + 2) % len(WORDS) for w, i in ids.items()}
    model(tmp_path / "x", ids, 0)
    model(tmp_path / "y", turned, 1)
    table = np.full((len(WORDS), HIDDEN), -0.0, BF16)
    table.view(np.uint16)[:, 1] = np.arange(len(WORDS)) + 0x7FC1  # NaNs, each with a payload of its own
    write_file(tmp_path / "y" / "model.safetensors", read_checkpoint(tmp_path / "y") | {TABLES[0]: table})
    got = aligned(tmp_path, "xy", "x")[1][TABLES[0]].compute()
    wanted = np.stack([table[turned[w]] for w in WORDS])
    assert got.view(torch.uint8).numpy().tobytes() == bits(wanted)


def test_large_tables_are_gathered_over_pieces(tmp_path: Path) -> None:
    """More than one piece, a permutation without runs, and a few rows from elsewhere."""
    count, width = 1200, 600  # 720,000 elements: two pieces
    rng = np.random.default_rng(5)
    order = rng.permutation(count)
    for name, ids in (("x", {f"w{i}": i for i in range(count)}), ("y", {f"w{i}": int(order[i]) for i in range(count - 7)})):
        table = rng.standard_normal((count, width)).astype(np.float32)
        write_checkpoint(tmp_path / name, {TABLES[0]: table}, config=llama_config(0, hidden=width, vocab=count))
        (tmp_path / name / "tokenizer.json").write_text(word_level(ids | {"<unk>": ids.pop("w0")}))
    x, y = (stored(tmp_path / n, TABLES[0]) for n in "xy")
    vocabs = [vocab_of(tmp_path / n) for n in "xy"]
    got = tables(aligned(tmp_path, "xy", "base")[1], TABLES[0])
    wanted = reference([x, y], vocabs, vocabs[0], count)[1]
    np.testing.assert_array_equal(got, wanted)


def test_runs_of_rows_are_taken_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that moved together are one read of a mapped file, not a copy row by row: as in every large vocabulary."""
    from surgery.engine import mapping

    monkeypatch.setattr(mapping, "MAPPED_FROM", 1 << 16)
    count, width, moved = 1000, 128, 40
    rng = np.random.default_rng(6)
    for name, first in (("x", 0), ("y", moved)):
        words = {f"w{i}": i - first for i in range(first, count)} | {f"v{i}": count - first + i for i in range(first)}
        table = rng.standard_normal((count, width)).astype(BF16)
        write_checkpoint(tmp_path / name, {TABLES[0]: table}, config=llama_config(0, hidden=width, vocab=count))
        (tmp_path / name / "tokenizer.json").write_text(word_level(words))
    step, output = "out: {op: average, of: [x, y]}", "{from: out, dtype: float32, tokenizer: x}"
    run(recipe(tmp_path, step, models="xy", output=output), tmp_path / "out")
    x, y = (stored(tmp_path / n, TABLES[0]).astype(np.float64) for n in "xy")
    wanted = x.copy()
    wanted[moved:] = (x[moved:] + y[: count - moved]) / 2
    np.testing.assert_allclose(stored(tmp_path / "out", TABLES[0]), wanted, rtol=1e-6)


@pytest.mark.parametrize("padding", ["keep", "drop"])
@pytest.mark.parametrize("multiple", [None, 1, 8, 64])
def test_padding_is_kept_and_added(tmp_path: Path, multiple: int | None, padding: str) -> None:
    model(tmp_path / "x", WORDS, 0, rows=10, bias=True)
    model(tmp_path / "y", ["<unk>", "cat", "the", "dog"], 1, rows=9, bias=True)
    nodes = {n: surgery.open(tmp_path / n, name=n).node for n in "xy"}
    found = align(nodes, Policy("union", pad_to_multiple_of=multiple, padding=padding))
    vocabs = [vocab_of(tmp_path / n) for n in "xy"]
    out = vocabs[0] | {"dog": 6}
    end = 10 if padding == "keep" else 7
    rows = -(-end // (multiple or 1)) * (multiple or 1)
    for name in (*TABLES, "lm_head.bias"):
        read = [stored(tmp_path / n, name) for n in "xy"]
        for n, wanted in zip("xy", reference(read, vocabs, out, rows, end=end), strict=True):
            got = tables(surgery.Checkpoint(found.nodes[n]), name)
            np.testing.assert_array_equal(got, wanted.astype(BF16).astype(np.float64), err_msg=f"{n} {name}")
    flat = [stored(tmp_path / n, "final_logits_bias")[0] for n in "xy"]
    for n, wanted in zip("xy", reference(flat, vocabs, out, rows, end=end), strict=True):
        got = tables(surgery.Checkpoint(found.nodes[n]), "final_logits_bias")
        assert got.shape == (1, rows)
        np.testing.assert_array_equal(got[0], wanted.astype(BF16).astype(np.float64))


def test_rules_for_single_tokens(three: Path) -> None:
    rules = {
        "the": {"source": "y", "force": True},
        "<a>": {"source": {"model": "x", "token": "cat"}},
        "<b>": {"source": {"model": "z", "id": 2}, "force": True},
        "<new>": {"source": "zero"},
        "bird": {"source": {"kind": "model_token", "model": "x", "token_id": 5}},
        "dog": "zero",
        "cat": {"force": True},
    }
    made = aligned(three, "xyz", {"source": "union", "tokens": rules})
    vocabs = [vocab_of(three / n) for n in "xyz"]
    out = vocabs[0] | {"dog": 6, "bird": 7, "<a>": 8, "<both>": 9, "<b>": 10, "<new>": 11}
    assert made[0].node.vocabulary.ids == out
    plain = {
        "the": ((1, vocabs[1]["the"]), True), "<a>": ((0, 2), False), "<b>": ((2, 2), True), "<new>": ("zero", False),
        "bird": ((0, 5), False), "dog": ("zero", False), "cat": ((0, 2), True),
    }  # fmt: skip
    for name in TABLES:
        read = [stored(three / n, name) for n in "xyz"]
        for got, wanted in zip(made, reference(read, vocabs, out, 12, rules=plain), strict=True):
            np.testing.assert_array_equal(tables(got, name), wanted.astype(BF16).astype(np.float64))


def test_a_token_that_no_model_has_gets_zeros_and_a_warning(tmp_path: Path) -> None:
    """The tokenizer names a token beyond the rows; another model has a row for a later one."""
    model(tmp_path / "x", [*WORDS, "lost", "found"], 0, rows=6)
    model(tmp_path / "y", ["<unk>", "found"], 1)
    x, _ = aligned(tmp_path, "xy", "base")
    found = x.node.vocabulary
    assert any("1 token has a row in no model: zeros" in w for w in found.warnings)
    got = tables(x, TABLES[0])
    assert got.shape == (8, HIDDEN) and not got[6].any()
    np.testing.assert_array_equal(got[7], stored(tmp_path / "y", TABLES[0])[1].astype(np.float64))


def test_tokens_beyond_every_table_do_not_make_rows(tmp_path: Path) -> None:
    model(tmp_path / "x", [*WORDS, "<pad>"], 0, rows=6)
    model(tmp_path / "y", list(reversed(WORDS)), 1)
    x, y = aligned(tmp_path, "xy", "x")
    assert tables(x, TABLES[0]).shape == tables(y, TABLES[0]).shape == (6, HIDDEN)
    assert any("no row in any model" in w for w in x.node.vocabulary.warnings)


def test_rows_of_a_wider_type_keep_their_bits(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", ["<unk>", "dog"], 1, dtype=np.float32)
    x, _ = aligned(tmp_path, "xy", "union")
    assert x[TABLES[0]].dtype == "float32"
    np.testing.assert_array_equal(tables(x, TABLES[0])[6], stored(tmp_path / "y", TABLES[0])[1].astype(np.float64))


def test_tied_and_untied_models(tmp_path: Path) -> None:
    """A tied model's head is its embedding, also where it gives rows to another's head."""
    model(tmp_path / "x", WORDS, 0, head=False, tied=True)
    model(tmp_path / "y", ["<unk>", "dog", "cat"], 1)
    x, y = aligned(tmp_path, "xy", "union")
    vocabs = [vocab_of(tmp_path / n) for n in "xy"]
    out = vocabs[0] | {"dog": 6}
    embed = [stored(tmp_path / n, TABLES[0]) for n in "xy"]
    assert "lm_head.weight" not in x
    np.testing.assert_array_equal(tables(y, TABLES[0]), reference(embed, vocabs, out, 7)[1])
    heads = [embed[0], stored(tmp_path / "y", TABLES[1])]
    np.testing.assert_array_equal(tables(y, TABLES[1]), reference(heads, vocabs, out, 7)[1])
    both = surgery.ops.average([x, y])
    plan = both.plan()
    assert plan.config["tie_word_embeddings"] is False and plan.config["vocab_size"] == 7
    half = (reference(heads, vocabs, out, 7)[0] + reference(heads, vocabs, out, 7)[1]) / 2
    np.testing.assert_array_equal(tables(both, TABLES[1]), half.astype(BF16).astype(np.float64))


def test_models_that_agree_are_left_alone(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", WORDS, 1)
    nodes = {n: surgery.open(tmp_path / n, name=n).node for n in "xy"}
    for source in ("union", "base", "y"):
        found = align(nodes, Policy(source))
        assert all(found.nodes[n] is nodes[n] for n in "xy")
        assert found.tokenizer is not None and not found.tokenizer.new
    assert found.tokenizer.source.label == "y"


def test_a_delta_lacks_nothing(tmp_path: Path) -> None:
    """Deltas made of aligned models, and aligned deltas: a token that a delta does not know is not changed by it."""
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", ["<unk>", "cat", "the", "dog"], 1)
    x, y = aligned(tmp_path, "xy", "union")
    np.testing.assert_array_equal(tables(y - x, TABLES[0])[6], np.zeros(HIDDEN))
    model(tmp_path / "z", ["<unk>", "cat", "the", "dog"], 2)
    z, loose = surgery.open(tmp_path / "z", name="z"), surgery.open(tmp_path / "y", name="y")
    nodes = {"x": surgery.open(tmp_path / "x", name="x").node, "d": (z - loose).node, "y": loose.node}
    got = tables(surgery.Checkpoint(align(nodes, Policy("base")).nodes["d"]), TABLES[0])
    change = stored(tmp_path / "z", TABLES[0]).astype(np.float64) - stored(tmp_path / "y", TABLES[0]).astype(np.float64)
    wanted = np.zeros((6, HIDDEN))
    wanted[[0, 2, 1]] = change[[0, 1, 2]]  # <unk>, cat, the
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


def test_the_plan_says_what_becomes_of_every_model(three: Path) -> None:
    made = aligned(three, "xyz", "union")
    text = str(surgery.ops.average(made).plan())
    assert "x: ALIGN union, 11 rows: 1 only in x, 2 rows from y, 2 rows from z, 1 row the mean of those that have it" in text
    assert "y: ALIGN union, 11 rows: 5 tokens moved, 2 only in y, 2 rows from x, 2 rows from z" in text
    assert "z: ALIGN union, 11 rows: 5 tokens moved, 2 only in z, 3 rows from x, 2 rows from y" in text
    assert all(isinstance(c.node, AlignedNode) for c in made)


def test_what_is_wrong_is_said(three: Path) -> None:
    def refused(match: str, tokenizer: Any, names: str = "xyz", **options: Any) -> None:
        with pytest.raises(Refused, match=match):
            aligned(three, names, tokenizer, **options)

    refused("`q` is not a model", "q")
    refused("unknown key `tokns`", {"tokns": {}})
    refused("token `dog`: there is no model `q`", {"tokens": {"dog": {"source": "q"}}})
    refused("token `dog`: x has no token `dog`", {"tokens": {"dog": {"source": "x"}}})
    refused("token `dog`: x has 6 rows, none with id 6", {"tokens": {"dog": {"source": {"model": "x", "id": 6}}}})
    refused("needs either `token` or `id`", {"tokens": {"dog": {"source": {"model": "x", "token": "a", "id": 6}}}})
    refused("`force` must be true or false", {"tokens": {"dog": {"force": 1}}})
    refused("`pad_to_multiple_of` must be a whole number from 1, got 0", {"pad_to_multiple_of": 0})
    refused("`nobody` is not a model", "union", base="nobody")
    with pytest.raises(Refused, match="two checkpoints are called `x`"):
        aligned(three, "xx", "union")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    model(tmp_path / "y", ["<unk>", "dog"], 1)
    model(tmp_path / "n", WORDS, 2, tokenizer=False)
    model(tmp_path / "m", [*WORDS, "more"], 3, tokenizer=False)
    made = aligned(tmp_path, "xyn", "union")
    assert any("n has no tokenizer that can be read: its 6 rows are taken as x's" in w for w in made[0].node.vocabulary.warnings)
    with pytest.raises(Refused, match=r"m: no tokenizer can be read in .*m: which rows are which tokens is not known"):
        aligned(tmp_path, "xym", "union")
    with pytest.raises(Refused, match="n: no tokenizer can be read"):
        aligned(tmp_path, "nx", "union")
    kept = aligned(tmp_path, "n", "n")
    assert list(kept[0]) == list(surgery.open(tmp_path / "n"))


def test_unaligned_models_do_not_slip_in(three: Path) -> None:
    x, y = aligned(three, "xy", "base")
    loose = surgery.open(three / "z", name="z").cast("float32")
    with pytest.raises(Refused, match=r"tokenizers of x and z differ: 2 tokens have other ids"):
        surgery.ops.average([x, y, loose]).plan()
    with pytest.raises(Refused, match=r"surgery\.align"):
        surgery.ops.average([surgery.open(three / "x", name="x"), surgery.open(three / "y", name="y")]).plan(tokenizer="union")
    again, _ = aligned(three, "xz", "union")
    with pytest.raises(Refused, match="in several goes"):
        surgery.ops.average([x, again], missing="skip").plan()


def test_mixing_rows_of_codes_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    for seed, name in enumerate("yz", start=1):
        model(tmp_path / name, ["<unk>", "dog", "cat"], seed, dtype=np.int32)
    with pytest.raises(Refused, match=r"`model.embed_tokens.weight` is .*: rows cannot be exchanged|: rows of it can be moved, but not averaged"):
        aligned(tmp_path, "xyz", "union")


def test_two_plans_have_the_same_token_and_other_tokens_another(three: Path) -> None:
    def token(tokenizer: Any) -> str:
        return make_plan(surgery.ops.average(aligned(three, "xyz", tokenizer)).node).token

    assert token("union") == token("union")
    assert len({token(t) for t in ("union", "base", "y", {"tokens": {"dog": "zero"}}, {"pad_to_multiple_of": 16})}) == 5


# -- recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "place", "message"),
    [
        ("tokenizer: unoin", "6:21", "`unoin` is not a model of this recipe"),
        ("tokenizer: {source: q}", "6:21", "`q` is not a model"),
        ("tokenizer: {tokns: {}}", "6:21", "unknown key `tokns`"),
        ("tokenizer: {tokens: {dog: {sauce: x}}}", "6:33", "unknown key `sauce` in token `dog`"),
        ("tokenizer: {tokens: [dog]}", "6:33", "must be a map from token"),
        ("pad_to_multiple_of: 0.5", "6:21", "whole number"),
        ("tokenizer: 3", "6:21", "`3` is not a model"),
    ],
)
def test_mistakes_are_placed(three: Path, output: str, place: str, message: str) -> None:
    path = recipe(three, "out: {op: average, of: [x, y]}", models="xy", output=f"{{from: out, {output}}}")
    with pytest.raises(Refused, match=message) as found:
        plan(path)
    assert f"recipe.yaml:{place}: " in str(found.value)


def test_a_model_may_only_give_tokens(three: Path) -> None:
    """z takes no part in the merge; its tokenizer and the rows of its tokens do."""
    path = recipe(three, "out: {op: average, of: [x, y]}", models="xyz", output="{from: out, tokenizer: z}")
    run(path, three / "out")
    made, vocabs = read_checkpoint(three / "out"), [vocab_of(three / n) for n in "xyz"]
    assert vocab_of(three / "out") == vocabs[2]
    aligned_tables = reference([stored(three / n, TABLES[0]) for n in "xyz"], vocabs, vocabs[2], 6, donor=2)
    half = (aligned_tables[0] + aligned_tables[1]) / 2
    np.testing.assert_allclose(made[TABLES[0]].astype(np.float64), half, rtol=2**-8, atol=1e-9)
    with pytest.raises(Refused, match="`z` is not used by the output"):
        plan(recipe(three, "out: {op: average, of: [x, y]}", models="xyz", output="{from: out, tokenizer: x}"))


def test_base_is_the_model_whose_config_goes_along(three: Path) -> None:
    """Not the first that is listed: the first input of the first input of the output."""
    steps = "d: {op: diff, of: [y, x]}\nout: {op: add, of: [z, d]}"
    made = plan(recipe(three, steps, models="xyz", output="{from: out, tokenizer: base}"))
    assert made.settings.vocabulary.source.label == made.donor.label == "z"
    named = recipe(three, "out: {op: average, of: [x, base]}", models=["x", "base"], output="{from: out, tokenizer: base}")
    (three / "base").symlink_to(three / "y")
    assert plan(named).settings.vocabulary.source.label == "base"


def test_the_schema_knows_the_policies() -> None:
    import jsonschema

    from surgery.recipe.schema import recipe_schema

    check = jsonschema.Draft202012Validator(recipe_schema()).is_valid
    whole = {"source": "union", "pad_to_multiple_of": 64, "tokens": {"a": {"source": {"model": "x", "id": 3}, "force": True}}}
    for said in ("union", whole, {"tokens": {"b": {"source": "zero"}}}):
        assert check({"models": {"x": "x"}, "output": {"from": "x", "tokenizer": said, "chat_template": "auto"}})
    for wrong in (3, {"source": 3}, {"tokens": {"a": "x", "b": 2}}, {"pad": 3}, {"tokens": {"a": {"source": {"token": "t"}}}}):
        assert not check({"models": {"x": "x"}, "output": {"from": "x", "tokenizer": wrong}})


def test_python_and_recipe_make_the_same_bytes(three: Path) -> None:
    path = recipe(three, "out: {op: average, of: [x, y, z]}", models="xyz", output="{from: out, tokenizer: union}")
    run(path, three / "one")
    surgery.ops.average(aligned(three, "xyz", "union")).save(three / "two")
    surgery.load(path).save(three / "three")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (three / "one" / name).read_bytes() == (three / "two" / name).read_bytes() == (three / "three" / name).read_bytes()
