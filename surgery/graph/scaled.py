"""Checkpoints stored as codes with scales (FP8 as DeepSeek and vLLM write it, symmetric INT8), as the weights they are.

    weight = scale * code

with one scale per tensor, per output row, or per block of rows and columns. Operators compute with the weights; a checkpoint
that is only copied, cut or renamed keeps its codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import BY_NAME, BY_TORCH, DType
from surgery.graph.edit import EditNode
from surgery.graph.expr import Derived, Expr, Fetch
from surgery.graph.node import Node, sources_of

_SUFFIXES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub")
_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")


class Dequantised(Derived):
    """scale * code. Codes (..., m, n), or (m,); scales of one element, or (..., ceil(m / block[0]), ceil(n / block[1]))."""

    __slots__ = ("block",)

    def __init__(self, codes: Expr, scale: Expr, block: tuple[int, int], dtype: DType, origin: Any) -> None:
        super().__init__([codes, scale], codes.shape, dtype, origin)
        self.block = block

    @property
    def identity(self) -> str:
        return f"dequantised/{self.block}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        codes, scale = self.args
        values = fetch(codes, start, stop)
        factors = fetch(scale)
        if scale.numel == 1:
            return values * work(factors[0])
        *_, m, n = self.shape if len(self.shape) > 1 else (1, *self.shape)
        tall, wide = self.block
        table = factors.reshape(-1, -(-m // tall), -(-n // wide))  # one per stacked matrix
        if start % n == 0 and stop % n == 0:
            rows = np.arange(start // n, stop // n)
            by_row = table[rows // m, (rows % m) // tall]
            if wide >= n:
                return (values.reshape(-1, n) * by_row).reshape(-1)
            return (values.reshape(-1, n) * np.repeat(by_row, wide, axis=1)[:, :n]).reshape(-1)
        row, first = divmod(start, n)
        by_block = table[row // m, (row % m) // tall]
        return values * np.repeat(by_block, wide)[first : first + stop - start]


class DequantisedNode(EditNode):
    """The weights of a checkpoint that holds codes; scales are folded in and config says nothing of quantisation."""

    verb = "DEQUANTISE"

    def __init__(self, node: Node, pairs: Mapping[str, str]) -> None:
        super().__init__(node)
        self.pairs = dict(pairs)  # tensor of codes -> its scale

    def _build(self) -> dict[str, Expr]:
        tensors, config = self.inputs[0].tensors, self.inputs[0].config or {}
        scales = set(self.pairs.values())
        made: dict[str, Expr] = {}
        for name, expr in tensors.items():
            if name in scales:
                self.dropped[name] = "a scale: folded into the weights it belongs to"
            elif name.endswith(_OF_ACTIVATIONS):
                self.dropped[name] = "a scale of the quantised model's activations: without meaning for plain weights"
            elif name in self.pairs:
                made[name] = self._weights(name, expr, tensors[self.pairs[name]], config)
            else:
                made[name] = expr
        return made

    def _weights(self, name: str, codes: Expr, scale: Expr, config: Mapping[str, Any]) -> Expr:
        kind = config.get("dtype") or config.get("torch_dtype")
        dtype = BY_TORCH.get(str(kind), BY_NAME["BF16"])
        block = self._block(name, codes.shape, scale, config)
        return Dequantised(codes, scale, block, dtype if dtype.is_float and dtype.size > 1 else BY_NAME["BF16"], self)

    def _block(self, name: str, shape: tuple[int, ...], scale: Expr, config: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns that share a scale. Raises Refused where the scale's shape fits no way of scaling."""
        *stack, m, n = shape if len(shape) > 1 else (1, *shape)
        if scale.numel == 1:
            return m, n
        tall, wide = scale.shape[-2:] if len(scale.shape) > len(stack) + 1 else (scale.shape[-1], 1)
        stated = (config.get("quantization_config") or {}).get("weight_block_size") or ()
        for rows, columns in ([tuple(stated)] if len(stated) == 2 else []) + [(-(-m // tall), -(-n // wide))]:
            whole = (*stack, -(-m // rows), -(-n // columns))
            if whole[-2:] == (tall, wide) and int(np.prod(whole)) == scale.numel:
                return int(rows), int(columns)
        raise self.refuse(
            f"`{name}` has shape {list(shape)} and its scale `{self.pairs[name]}` {list(scale.shape)}: not a scale per tensor, "
            "per row or per block",
            hint="dequantise this checkpoint with the tool that quantised it",
        )

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        return config and {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}

    @property
    def text(self) -> str:
        return f"{len(self.pairs)} tensors of codes"


def dequantised(node: Node) -> Node:
    """`node` itself, or its weights where it holds codes with scales."""
    if not any(s.source.holds_codes for s in sources_of(node)):
        return node
    method = ((node.config or {}).get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in _METHODS:
        return node  # refused by the plan, which says what to do
    tensors = node.tensors
    if not any(e.dtype.is_scaled_code or (method and e.dtype.name == "I8") for e in tensors.values()):
        return node
    pairs = {}
    for name, expr in tensors.items():
        if not (expr.dtype.is_scaled_code or (method and expr.dtype.name == "I8")):
            continue
        if f"{name}_zero_point" in tensors:
            continue
        scale = next((name + s for s in _SUFFIXES if name + s in tensors), None)
        if scale is not None and tensors[scale].dtype.is_float:
            pairs[name] = scale
    return DequantisedNode(node, pairs) if pairs else node
