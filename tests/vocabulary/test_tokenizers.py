"""The tokenizer files that are written, read back by transformers; token ids in configs; chat templates; stored formats."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers import config_of, plan, read_checkpoint, recipe, run, write_json
from vocab_models import TABLES, added_tokens, model, vocab_of, word_level

import surgery
from surgery import Refused
from surgery.checkpoint.vocabulary import read_tokens, token_ids
from surgery.vocabulary.config import lost_ids, moved_ids
from surgery.vocabulary.template import BUILT_IN

WORDS = ["<unk>", "the", "cat", "sat", "on", "mat"]
AVERAGE = "out: {op: average, of: [x, y]}"


def average(folder: Path, output: str) -> Path:
    run(recipe(folder, AVERAGE, models="xy", output=output), folder / "out", overwrite=True)
    return folder / "out"


def loaded(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def bpe(folder: Path, text: str, added: list[tuple[str, bool]]) -> dict[str, int]:
    """Replace a model's tokenizer by a byte-level BPE trained on `text`; its rows must suffice."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([text] * 4, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"]))
    for token, special in added:
        made.add_tokens([AddedToken(token, special=special, normalized=not special)])
    made.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    return made.get_vocab(with_added_tokens=True)


def test_added_tokens_are_one_id_and_special_as_they_were(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0, added=[("<s>", True)])
    model(tmp_path / "y", WORDS, 1, added=[("<tool>", False), ("<s>", True), ("<end>", True)])
    out = average(tmp_path, "{from: out, tokenizer: union}")
    ids = vocab_of(tmp_path / "x") | {"<tool>": 7, "<end>": 8}
    assert token_ids(out) == vocab_of(out) == ids
    tokenizer = loaded(out)
    assert tokenizer.get_vocab() == ids
    assert tokenizer("the<tool>cat<end>").input_ids == [1, 7, 2, 8]
    assert tokenizer.decode([1, 7, 8], skip_special_tokens=True).split() == ["the", "<tool>"]
    entries = added_tokens(out)
    assert [entries[t]["special"] for t in ("<s>", "<tool>", "<end>")] == [True, False, True]
    assert config_of(out)["vocab_size"] == len(read_checkpoint(out)[TABLES[0]]) == 9


def test_pieces_of_another_bpe_keep_the_ids_of_what_was_there(tmp_path: Path) -> None:
    """Ordinary pieces get rows and ids, and text is still split as the first tokenizer splits it."""
    for seed, name in enumerate("xy"):
        model(tmp_path / name, WORDS, seed, rows=310)
    x = bpe(tmp_path / "x", "the cat sat on the mat", [("<keep>", False), ("<s>", True)])
    y = bpe(tmp_path / "y", "a dog ran over the hill hill dog", [("<new>", False)])
    text = "the cat sat on the hill, a dog<keep>"
    before = loaded(tmp_path / "x")(text).input_ids
    path = recipe(tmp_path, AVERAGE, models="xy", output="{from: out, tokenizer: union}")
    out = tmp_path / "out"
    run(path, out)
    after = loaded(out)
    ids = after.get_vocab()
    assert {t: ids[t] for t in x} == x
    assert ids == vocab_of(out) == token_ids(out)
    assert ids.keys() == x.keys() | y.keys() and sorted(ids.values()) == list(range(len(ids)))
    assert after(text).input_ids == before
    assert after("the<new>").input_ids[-1] == ids["<new>"] == max(ids.values())
    inner = next(t for t in y if t not in x and t.startswith("Ġ"))
    assert after.decode([ids[inner]]) == inner.replace("Ġ", " ")


@pytest.mark.parametrize("whole", [False, True])
def test_the_plan_says_what_is_not_merged(tmp_path: Path, whole: bool) -> None:
    """With `ignore_merges` whole words of the other tokenizer are used, and only then."""
    for seed, name in enumerate("xy"):
        model(tmp_path / name, WORDS, seed, rows=310)
    bpe(tmp_path / "x", "the cat sat on the mat", [])
    y = bpe(tmp_path / "y", "a hill hill hill hill", [])
    said = json.loads((tmp_path / "x" / "tokenizer.json").read_text())
    said["model"]["ignore_merges"] = whole
    write_json(tmp_path / "x" / "tokenizer.json", said)
    made = plan(recipe(tmp_path, AVERAGE, models="xy", output="{from: out, tokenizer: union}"))
    (said,) = [w for w in made.warnings if "merge rules" in w]
    assert ("only whole words among them are used" in said) == whole
    out = average(tmp_path, "{from: out, tokenizer: union}")
    assert "Ġhill" in y and (vocab_of(out)["Ġhill"] in loaded(out)("the hill").input_ids) == whole


def test_holes_between_ids_do_not_renumber_what_is_added(tmp_path: Path) -> None:
    model(tmp_path / "x", {"<unk>": 0, "the": 1, "far": 9}, 0, rows=10)
    model(tmp_path / "y", WORDS, 1, added=[("<new>", True)])
    out = average(tmp_path, "{from: out, tokenizer: {source: base, tokens: {<new>: {source: y}, <zero>: {source: zero}}}}")
    assert vocab_of(out) == {"<unk>": 0, "the": 1, "far": 9, "<new>": 10, "<zero>": 11}
    assert loaded(out)("the<new>far<zero>").input_ids == [1, 10, 9, 11]


def test_unigram_tokenizers_are_extended(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    for seed, (name, words) in enumerate((("x", ["<unk>", "a", "b", "ab"]), ("y", ["<unk>", "a", "cd"]))):
        model(tmp_path / name, words, seed, rows=6)
        made = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0, byte_fallback=False))
        made.add_special_tokens([f"<{name}>"])
        made.save(str(tmp_path / name / "tokenizer.json"))
    out = average(tmp_path, "{from: out, tokenizer: union}")
    assert vocab_of(out) == token_ids(out) == {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<x>": 4, "cd": 5, "<y>": 6}
    assert loaded(out)("ab<x>a<y>").input_ids == [3, 4, 1, 6]


def test_files_beside_tokenizer_json_are_extended_too(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0, added=[("<s>", True)])
    model(tmp_path / "y", WORDS, 1, added=[("<s>", True), ("<new>", True)])
    entry = added_tokens(tmp_path / "x")["<s>"]
    write_json(tmp_path / "x" / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"6": {k: v for k, v in entry.items() if k != "id"}},
    })  # fmt: skip
    write_json(tmp_path / "x" / "added_tokens.json", {"<s>": 6})
    out = average(tmp_path, "{from: out, tokenizer: union}")
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {i: e["content"] for i, e in decoder.items()} == {"6": "<s>", "7": "<new>"}
    assert json.loads((out / "added_tokens.json").read_text()) == {"<s>": 6, "<new>": 7}
    assert loaded(out)("the<new>").input_ids == [1, 7]


def test_a_tokenizer_that_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    (tmp_path / "x" / "tokenizer.json").unlink()
    write_json(tmp_path / "x" / "vocab.json", {w: i for i, w in enumerate(WORDS)})
    model(tmp_path / "y", WORDS, 1, added=[("<new>", True)])
    with pytest.raises(Refused, match=r"tokens can only be added to a tokenizer\.json, and there is none in .*x"):
        average(tmp_path, "{from: out, tokenizer: union}")
    assert len(read_checkpoint(average(tmp_path, "{from: out, tokenizer: x}"))[TABLES[0]]) == 6


def test_token_ids_in_configs_follow_their_tokens(tmp_path: Path) -> None:
    """With another model's tokenizer the config's donor says its own eos by its new id; where there is none, the other's."""
    said = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 5, "text_config": {"pad_token_id": -1}}
    model(tmp_path / "x", WORDS, 0, **said)
    model(tmp_path / "y", ["<unk>", "dog", "sat", "cat", "the"], 1, pad_token_id=1)
    write_json(tmp_path / "x" / "generation_config.json", {"eos_token_id": [2, 5], "pad_token_id": 5, "top_k": 5})
    out = average(tmp_path, "{from: out, tokenizer: y}")
    config = config_of(out)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (4, [3, 2], 1, 5)
    assert config["text_config"] == {"pad_token_id": -1}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [3], "pad_token_id": None, "top_k": 5}
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "y" / "tokenizer.json").read_bytes()
    unchanged = average(tmp_path, "{from: out, tokenizer: union}")
    assert config_of(unchanged)["eos_token_id"] == [2, 3]


def test_moving_ids() -> None:
    config = {"eos_token_id": 3, "suppress_tokens": [1, 3], "vision_config": {"eos_token_id": 3}, "x_tokens": 3, "a_token_id": None}
    move = {1: 10, 3: None}.get
    assert moved_ids(config, move, {"eos_token_id": 7}) == config | {"eos_token_id": 7, "suppress_tokens": [10]}
    assert moved_ids(config, move, None)["eos_token_id"] is None
    assert lost_ids(config, move) == ["eos_token_id"]


TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"


def test_chat_templates(tmp_path: Path) -> None:
    for seed, name in enumerate("xyz"):
        model(tmp_path / name, WORDS, seed)
    (tmp_path / "x" / "chat_template.jinja").write_text("X" + TEMPLATE)
    for name in "yz":
        write_json(tmp_path / name / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "Y" + TEMPLATE})
    (tmp_path / "file.jinja").write_text("F" + TEMPLATE)
    step = "out: {op: average, of: [x, y, z]}"
    asked = [("auto", "Y"), ("x", "X"), ("y", "Y"), ("file.jinja", "F"), (f'"L{TEMPLATE}"', "L")]
    for said, mark in asked:
        path = recipe(tmp_path, step, models="xyz", output=f"{{from: out, chat_template: {said}}}")
        run(path, tmp_path / "out", overwrite=True)
        got = loaded(tmp_path / "out").apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert got == f"{mark}hi|", said
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == mark + TEMPLATE
    for said, match in (("z1", "no model, no built-in template"), ("'{}'", "too short"), ("3", "must be text")):
        with pytest.raises(Refused, match=rf"recipe.yaml:\d+:\d+: `chat_template.*{match}"):
            run(recipe(tmp_path, step, models="xyz", output=f"{{from: out, chat_template: {said}}}"), tmp_path / "no")
    found = surgery.ops.average([surgery.open(tmp_path / n) for n in "xyz"])
    found.save(tmp_path / "python", chat_template="auto")
    assert (tmp_path / "python" / "chat_template.jinja").read_text() == "Y" + TEMPLATE


def test_a_model_without_a_template_cannot_give_one(tmp_path: Path) -> None:
    for seed, name in enumerate("xy"):
        model(tmp_path / name, WORDS, seed)
    with pytest.raises(Refused, match="y has no chat template"):
        average(tmp_path, "{from: out, chat_template: y}")
    assert not (average(tmp_path, "{from: out, chat_template: auto}") / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_render(name: str, tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0)
    write_json(tmp_path / "x" / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<b>", "eos_token": "<e>", "chat_template": BUILT_IN[name],
    })  # fmt: skip
    turns = [{"role": r, "content": c} for r, c in (("system", "be"), ("user", "ask"), ("assistant", "say"), ("user", "go"))]
    expected = {
        "chatml": "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nsay<|im_end|>\n"
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n",
        "alpaca": "be\n\n### Instruction:\nask\n\n### Response:\nsay<e>\n\n### Instruction:\ngo\n\n### Response:\n",
        "llama3": "<b>" + "".join(
            f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n{t['content']}<|eot_id|>" for t in turns
        ) + "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "<b>[INST] be\n\nask [/INST] say<e>[INST] go [/INST]",
        "exaone": "[|system|]be[|endofturn|]\n[|user|]ask\n[|assistant|]say[|endofturn|]\n[|user|]go\n[|assistant|]",
    }  # fmt: skip
    got = loaded(tmp_path / "x").apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert got == expected[name]


# -- stored formats ------------------------------------------------------------------------------------------------------


def sentencepiece_file(path: Path, pieces: list[str]) -> None:
    """A ModelProto by hand: pieces with scores and types, then a trainer spec."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    data = b""
    for i, piece in enumerate(pieces):
        inner = field(1, piece.encode()) + b"\x15" + struct.pack("<f", -float(i)) + b"\x18\x01"
        data += field(1, inner)
    path.write_bytes(data + field(2, b"\x20\x80\x02" + b"\x09" + b"\0" * 8))


def test_sentencepiece_models_are_read(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path / "tokenizer.model", ["<unk>", "▁the", "ä"])
    assert token_ids(tmp_path) == {"<unk>": 0, "▁the": 1, "ä": 2}
    write_json(tmp_path / "added_tokens.json", {"<pad>": 3})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True}, "4": {"content": "<x>", "special": True}, "5": 3, "z": {"content": "q"},
    }})  # fmt: skip
    found = read_tokens(tmp_path)
    assert found.ids == {"<unk>": 0, "▁the": 1, "ä": 2, "<pad>": 3, "<x>": 4}
    assert {t: e["special"] for t, e in found.added.items()} == {"<unk>": True, "<pad>": False, "<x>": True}
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizerFast"})
    assert token_ids(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\x0a\x80", b"\x0a\x05abc", b"\xff" * 20, b"\x0b", b"bytes of tiktoken"])
def test_other_files_called_tokenizer_model_are_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert token_ids(tmp_path) is None


def test_equal_maps_in_different_formats_are_the_same(tmp_path: Path) -> None:
    model(tmp_path / "x", WORDS, 0, tokenizer=False)
    sentencepiece_file(tmp_path / "x" / "tokenizer.model", WORDS)
    model(tmp_path / "y", WORDS, 1)
    assert (tmp_path / "y" / "tokenizer.json").read_text() == word_level({w: i for i, w in enumerate(WORDS)})
    out = average(tmp_path, "{from: out, tokenizer: x}")
    assert (out / "tokenizer.model").exists() and not (out / "tokenizer.json").exists()
