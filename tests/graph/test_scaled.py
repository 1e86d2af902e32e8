"""Codes with scales are the weights that they stand for: against plain numpy, for every way of scaling."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery import ops

RNG = np.random.default_rng(3)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SHAPES = {  # codes, scales, rows and columns that share one
    "tensor": ((60, 40), (), (60, 40)),
    "tensor, one element": ((60, 40), (1,), (60, 40)),
    "row": ((60, 40), (60, 1), (1, 40)),
    "row, flat": ((60, 40), (60,), (1, 40)),
    "blocks": ((300, 260), (3, 3), (128, 128)),
    "blocks that divide": ((64, 40), (4, 5), (16, 8)),
    "experts, blocks": ((3, 256, 130), (3, 2, 2), (128, 128)),
    "experts, one each": ((3, 20, 30), (3, 1, 1), (20, 30)),
    "a row longer than a piece": ((2, 600_000), (1, 4688), (128, 128)),
}


def weights(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    made = codes.astype(np.float64)
    if scale.size == 1:
        return made * float(scale.reshape(-1)[0])
    m, n = codes.shape[-2:]
    table = scale.reshape(*codes.shape[:-2], -(-m // block[0]), -(-n // block[1])).astype(np.float64)
    for index in np.ndindex(*table.shape):
        *stack, i, j = index
        at = (*stack, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        made[at] *= table[index]
    return made


def checkpoint(path, kind, suffix="_scale_inv", dtype=torch.float8_e4m3fn, **config):
    shape, scales, block = SHAPES[kind]
    codes = torch.from_numpy(RNG.standard_normal(shape).astype(np.float32) * 50)
    codes = codes.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else codes.to(dtype)
    scale = torch.as_tensor(np.exp(RNG.standard_normal(scales)), dtype=torch.float32)
    tensors = {"model.x.weight": codes, f"model.x.weight{suffix}": scale, "model.norm.weight": torch.ones(7).bfloat16()}
    tensors["model.x.input_scale"] = torch.ones(())
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "quantization_config": config or FP8}))
    return weights(codes.to(torch.float32).numpy(), scale.numpy(), block)


@pytest.mark.parametrize("kind", SHAPES)
def test_operators_see_the_weights(tmp_path, kind):
    a, b = checkpoint(tmp_path / "a", kind), checkpoint(tmp_path / "b", kind)
    merged = ops.average(surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b"))
    report = merged.save(tmp_path / "out")
    assert report.tensors == 2
    got = surgery.open(tmp_path / "out")["model.x.weight"].compute()
    assert got.dtype == torch.bfloat16
    want = ((a + b) / 2).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.abs(got.double().numpy() - want).max() <= 2**-7 * np.abs(want).max()
    assert (got.double().numpy() == want).mean() > 0.99
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_int8_of_compressed_tensors(tmp_path):
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    a = checkpoint(tmp_path / "a", "row", "_scale", torch.int8, **config)
    got = (surgery.open(tmp_path / "a") * 1.0).plan(dtype="float32")
    assert "DEQUANTISE" in str(got)
    (surgery.open(tmp_path / "a")).save(tmp_path / "out", dtype="float32")
    assert np.allclose(surgery.open(tmp_path / "out")["model.x.weight"].compute().double().numpy(), a, rtol=1e-6)


def test_copies_and_cuts_keep_codes_and_scales(tmp_path):
    checkpoint(tmp_path / "a", "blocks")
    model = surgery.open(tmp_path / "a")
    model.drop("*norm*").save(tmp_path / "out")
    out = surgery.open(tmp_path / "out")
    assert set(out) == set(model) - {"model.norm.weight"}
    assert torch.equal(out["model.x.weight"].compute().view(torch.uint8), model["model.x.weight"].compute().view(torch.uint8))
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


PACKED = {  # quant_method -> tensors beside a norm, words of the mend
    "gptq": ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}, "quantised from"),
    "awq": ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "quantised from"),
    "bitsandbytes": ({"weight": torch.uint8, "weight.absmax": torch.float32}, "dequantize()"),
    "mxfp4": ({"down_proj_blocks": torch.uint8, "down_proj_scales": torch.uint8}, "Mxfp4Config(dequantize=True)"),
}


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("method", list(PACKED))
def test_packed_codes_are_refused_with_the_mend(tmp_path, method, stated):
    """Whatever computes with any of their tensors, the float scales included; a config that says nothing does not help."""
    tensors, mend = PACKED[method]
    for name in "ab":
        (tmp_path / name).mkdir()
        made = {f"x.q.{n}": torch.ones(4, 4).to(kind) for n, kind in tensors.items()} | {"norm.weight": torch.ones(4)}
        save_file(made, tmp_path / name / "model.safetensors")
        config = {"quantization_config": {"quant_method": method, "bits": 4}} if stated else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    save_file({"x.q.weight": torch.ones(4, 4), "norm.weight": torch.ones(4)}, tmp_path / "plain.safetensors")
    a, b, plain = (surgery.open(tmp_path / n) for n in ("a", "b", "plain.safetensors"))
    for make in (lambda: ops.average(a, b).plan(), lambda: (a * 0.5).plan(), lambda: (a - plain).plan(),
                 lambda: a.plan(dtype="bfloat16")):  # fmt: skip
        with pytest.raises(surgery.Refused, match=f"is quantised .*{method if stated else ''}.*packed codes") as found:
            make()
        assert mend in found.value.hint
    a.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
