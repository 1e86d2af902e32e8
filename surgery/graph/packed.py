"""Checkpoints whose weights are packed codes: recognised, and what to do about it."""

from __future__ import annotations

from surgery.checkpoint.source import Source
from surgery.errors import Refused

_SCALED = ("fp8", "compressed-tensors", "fbgemm_fp8")  # codes with scales: read as weights
_NAMES = {  # ends of tensor names that only one way of packing has
    ".qweight": "gptq or awq",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors, packed",
    "_proj_blocks": "mxfp4",
}
_UNPACK = {
    "bitsandbytes": 'unpack it first, with bitsandbytes installed: AutoModelForCausalLM.from_pretrained("{path}")'
    '.dequantize().save_pretrained("unpacked")',
    "mxfp4": 'unpack it first: AutoModelForCausalLM.from_pretrained("{path}", quantization_config=Mxfp4Config(dequantize=True))'
    '.save_pretrained("unpacked")',
    "compressed-tensors, packed": 'unpack it first: AutoModelForCausalLM.from_pretrained("{path}", quantization_config='
    'CompressedTensorsConfig(dequantize=True)).save_pretrained("unpacked")',
}
_ORIGINAL = "use the model it was quantised from (its card names it), and quantise the result again"


def packing(source: Source) -> str | None:
    """How a checkpoint's weights are packed ("gptq", "awq", "bitsandbytes", ...); None for plain weights and scaled codes."""
    found = next((how for name in source.tensors for end, how in _NAMES.items() if name.endswith(end)), None)
    method = str(((source.config or {}).get("quantization_config") or {}).get("quant_method") or "")
    if method and method not in _SCALED:
        return method
    return found


def packed_codes(source: Source, how: str, name: str) -> Refused:
    """What computing with tensor `name` of a checkpoint packed as `how` is refused with."""
    bits = ((source.config or {}).get("quantization_config") or {}).get("bits")
    mend = _UNPACK.get(how)
    return Refused(
        f"{source.label}: is quantised ({how}{f', {bits} bit' if bits else ''}): its weights are packed codes, and `{name}` "
        "cannot be computed with",
        hint=f"{_ORIGINAL}{'; or ' + mend.format(path=source.location) if mend else ''}",
    )
