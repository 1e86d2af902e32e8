"""GGUF files as inputs: against the models they were made from, and against transformers' own reading of them."""

import re
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery import ops
from surgery.cli import main
from surgery.delta.container import Package

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = ["<pad>", "<s>", "</s>", "ab", *(chr(c) for c in range(34, 126))]
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES = {  # architecture in the file -> (config, further keys)
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen2moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True}),  # as all such models, and llama.cpp, have it
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2Config", {"use_bias": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """architecture -> (folder of the saved model, its tensors); made when first asked for."""
    made = {}

    def model(arch):
        if arch not in made:
            torch.manual_seed(len(arch))
            kind, more = FAMILIES[arch]
            config = getattr(transformers, kind)(**COMMON | more)
            net = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for p in net.parameters():  # norms too: a shift that is missed must show
                    p.copy_(torch.randn(p.shape))
            folder = tmp_path_factory.mktemp(arch)
            net.save_pretrained(folder)
            made[arch] = folder, load_file(folder / "model.safetensors")
        return made[arch]

    return model


@pytest.fixture
def command(monkeypatch):
    """Runs the command line in this process: its exit status."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
        try:
            main()
        except SystemExit as done:
            return done.code
        return 0

    return run


def convert(path, arch, tensors, kinds=None, metadata=True, heads=None):
    """A GGUF file as llama.cpp's converter makes it. kinds: name -> how to quantise it; else as it is. heads: of keys, by block."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    if metadata:
        for add, key in (
            (writer.add_context_length, "max_position_embeddings"), (writer.add_embedding_length, "hidden_size"),
            (writer.add_block_count, "num_hidden_layers"), (writer.add_feed_forward_length, "intermediate_size"),
            (writer.add_head_count, "num_attention_heads"),
            (writer.add_rope_dimension_count, "head_dim"), (writer.add_vocab_size, "vocab_size"),
            (writer.add_key_length, "head_dim"), (writer.add_value_length, "head_dim"),
        ):  # fmt: skip
            add(COMMON[key])
        writer.add_head_count_kv(heads or COMMON["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_layer_norm_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_string("general.note", "a value that nobody asks for")
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if "moe" in arch:
            writer.add_expert_count(3)
            writer.add_expert_used_count(2)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], COMMON["num_hidden_layers"])
    stacked = {}
    for name, value in tensors.items():
        stacked.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(value.float().numpy())
    for name, values in stacked.items():
        value = np.stack(values) if len(values) > 1 else values[0]
        if arch == "llama" and re.search(r"\.(q|k)_proj\.", name):  # the halves of a head, interleaved
            heads = COMMON["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        kind = (kinds or {}).get(name)
        data = value if kind is None else gguf.quantize(value, kind)
        writer.add_tensor(known, data, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path


@pytest.mark.parametrize("arch", FAMILIES)
def test_an_unquantised_file_is_the_model(arch, models, tmp_path):
    """Names, order of rows, experts, shifts: written and read again, every number is what it was."""
    folder, tensors = models(arch)
    node = surgery.open(convert(tmp_path / "m.gguf", arch, tensors))
    node.save(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        shifted = arch.startswith("gemma") and name.endswith("norm.weight")  # (x + 1) - 1 in float32
        assert found[name].shape == value.shape
        assert torch.allclose(found[name], value, rtol=0, atol=1e-6 if shifted else 0), name
    ids = torch.tensor([[1, 5, 7, 11, 90]])
    with torch.no_grad():
        want, got = (
            transformers.AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32, attn_implementation="eager")(ids).logits
            for at in (folder, tmp_path / "out")
        )
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())), (got - want).abs().max()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2"])
def test_a_quantised_file_is_what_transformers_makes_of_it(arch, models, tmp_path):
    _, tensors = models(arch)
    types = gguf.GGMLQuantizationType
    some = (types.Q4_0, types.Q8_0, types.Q5_1, types.BF16)
    kinds = {n: some[i % 4] for i, n in enumerate(n for n, t in tensors.items() if t.ndim == 2)}
    path = convert(tmp_path / "m.gguf", arch, tensors, kinds)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    ).state_dict()
    merged = ops.average(surgery.open(path), surgery.open(path))
    merged.save(tmp_path / "out", dtype="float32")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, peer[name]), name
    surgery.open(path).save(tmp_path / "copy", threads=2)
    for name, value in load_file(tmp_path / "copy" / "model.safetensors").items():
        assert torch.equal(value.float(), peer[name].to(value.dtype).float()), name
        assert value.dtype == (torch.bfloat16 if name in kinds else torch.float32)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_1", "Q5_0"])
def test_pieces_of_blocks_are_the_whole(kind, tmp_path):
    """Any range of elements, of rows in order and of paired ones, is that range of what the library makes of all bytes."""
    from surgery.checkpoint.dtypes import BY_NAME
    from surgery.gguf.node import packing
    from surgery.gguf.values import Unpacked
    from surgery.graph.expr import Literal

    number = gguf.GGMLQuantizationType[kind]
    packed = packing(number.value)
    raw = np.random.default_rng(0).integers(0, 100, (8, 512 // packed.elements * packed.nbytes), dtype=np.uint8)
    whole = gguf.dequantize(raw, number)

    class Fetch:
        def raw(self, arg, start, stop):
            return raw.reshape(-1)[start:stop]

    read = Literal(torch.zeros(raw.size), BY_NAME["U8"], None)
    paired = whole.reshape(2, 2, 2, 512).swapaxes(1, 2).reshape(-1)
    for start, stop in ((0, 4096), (512, 1024), (5, 7), (1000, 3000), (4095, 4096), (256, 512)):
        for head, true in ((0, whole.reshape(-1)), (4, paired)):
            expr = Unpacked(read, (8, 512), BY_NAME["BF16"], None, packing=packed, head=head)
            assert np.array_equal(expr.piece(Fetch(), start, stop, np.float32), true[start:stop], equal_nan=True)


def test_split_files_folders_and_the_command_line(models, tmp_path, command, capsys):
    folder, tensors = models("llama")
    whole = convert(tmp_path / "w.gguf", "llama", tensors)
    split = tmp_path / "split"
    split.mkdir()
    half = len(tensors) // 2
    convert(split / "m-00001-of-00002.gguf", "llama", dict(list(tensors.items())[:half]))
    convert(split / "m-00002-of-00002.gguf", "llama", dict(list(tensors.items())[half:]), metadata=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("models: {a: w.gguf, b: split}\nsteps:\n  m: {op: average, of: [a, b]}\noutput: {from: m}\n")
    assert command("run", recipe, "-o", tmp_path / "out", "-q") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [TOKENS.index("ab"), TOKENS.index("c")]
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():  # the head lies in the second part: it is not tied to the embeddings for that
        want, got = (
            transformers.AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32)(ids).logits
            for at in (folder, tmp_path / "out")
        )
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    capsys.readouterr()
    assert command("inspect", whole) == 0
    assert "model.layers.{0-1}.self_attn.q_proj.weight" in capsys.readouterr().out
    (split / "m-00002-of-00002.gguf").rename(split / "gone")
    assert command("plan", recipe) == 2
    assert "m-00002-of-00002.gguf: missing" in capsys.readouterr().err


def test_commands_that_want_files_say_how_to_unpack_one(models, tmp_path, command, capsys):
    whole = convert(tmp_path / "w.gguf", "llama", models("llama")[1])
    assert command("inspect", "--scan", whole) == 2
    typed = re.search(r'python -c "(.*)"', capsys.readouterr().err).group(1)
    subprocess.run([sys.executable, "-c", typed], cwd=tmp_path, check=True)
    assert len(load_file(tmp_path / "unpacked" / "model.safetensors")) == len(models("llama")[1])


def test_what_cannot_be_read_is_refused(models, tmp_path):
    tensors = models("llama")[1]
    raw = convert(tmp_path / "w.gguf", "llama", tensors).read_bytes()
    cases = {
        "begin with the letters": b"GGML" + raw[4:],
        "version 1": raw[:4] + struct.pack("<I", 1) + raw[8:],
        "big-endian": raw[:4] + struct.pack(">I", 3) + raw[8:],
        "ends within its header": raw[:200],
        "the file has": raw[:-100],
        "architecture falcon9": raw.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 7) + b"falcon9", 1),
        "is not known of llama": raw.replace(b"blk.0.attn_norm", b"blk.0.attn_nose", 1),
        "have the name of another": raw.replace(b"blk.0.attn_q.", b"blk.0.attn_k.", 1),
        "heads do not divide": raw.replace(b"llama.attention.head_count_kv" + struct.pack("<II", 4, 2),
                                           b"llama.attention.head_count_kv" + struct.pack("<II", 4, 7), 1),
    }  # fmt: skip
    for said, content in cases.items():
        assert content != raw, said
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(surgery.Refused) as found:
            _ = surgery.open(tmp_path / "bad.gguf").plan()
        assert said in f"{found.value} {found.value.hint}", found.value
    path = convert(tmp_path / "varied.gguf", "llama", tensors, heads=[2, 2])
    with pytest.raises(surgery.Refused, match="every block its own number of heads"):
        surgery.open(path).plan()
    (tmp_path / "m-00003-of-00002.gguf").write_bytes(raw)
    with pytest.raises(surgery.Refused, match="none of them"):
        surgery.open(tmp_path / "m-00003-of-00002.gguf")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(raw)
    with pytest.raises(surgery.Refused, match="holds 2 GGUF files"):
        surgery.open(tmp_path / "two")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(where damaged files go, the bytes of a sound one of a few hundred bytes)."""
    home = tmp_path_factory.mktemp("damaged")
    writer = gguf.GGUFWriter(str(home / "m.gguf"), "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "long token"])
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return home / "bad.gguf", (home / "m.gguf").read_bytes()


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0, 3000)))
def test_a_damaged_header_is_refused_or_read(at, byte, cut, small):
    """No traceback, no allocation beyond the file, whatever a header says."""
    from surgery.gguf.header import read_header

    path, raw = small
    bad = bytearray(raw)
    bad[at % len(bad)] = byte
    path.write_bytes(bytes(bad[:cut]))
    try:
        assert read_header(path).size == len(bad[:cut])
    except surgery.Refused as refused:
        assert str(path) in str(refused)


def test_a_file_is_the_base_of_a_package(models, tmp_path, command):
    """Packages speak of the weights that a file stands for, under their names."""
    path = convert(tmp_path / "w.gguf", "llama", models("llama")[1])
    tuned = {n: t + 0.01 * torch.randn_like(t) for n, t in models("llama")[1].items()}
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    package = tmp_path / "p.delta.safetensors"
    assert command("delta", "pack", "--base", path, "--model", tmp_path / "tuned", "-o", package, "-q") == 0
    assert command("delta", "apply", package, "--base", path, "-o", tmp_path / "again", "-q") == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in tuned.items())
    entries = Package(str(package)).manifest.entries
    assert all(e.base is not None and e.base.name == n for n, e in entries.items())
