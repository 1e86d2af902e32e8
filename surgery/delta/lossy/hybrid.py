"""Codecs one after the other: each codes what those before it left, and the delta is the sum, in float32, in order.

`hybrid/1` takes any stages; the default, a water-filled SVD at 0.1 bits and a DARE of the rest, is for the lowest rates.
`loftq/1` fits a quantised part Q and a low-rank part L together: alternately Q = q(D - L) and L = svd_r(D - Q), beginning
with either (`start: quantise` is LoftQ, arXiv:2310.08659; `start: svd` LQ-LoRA, arXiv:2311.12023). The error does not always
fall, so the best pair so far is what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, Lossy, lossy, lossy_codec
from surgery.delta.lossy.common import Array, Codec, Parts
from surgery.delta.lossy.inputs import Inputs

STAGE = {"type": "object", "required": ["codec"], "properties": {"codec": {"type": "string"}}}
_MOST = 8


@lossy
class Hybrid(Codec):
    name = "hybrid/1"
    calibrated = True
    options = MappingProxyType(
        {
            "stages": {
                "type": "array",
                "minItems": 1,
                "maxItems": _MOST,
                "items": STAGE,
                "default": [{"codec": "svd_wf/1", "bits": 0.1}, {"codec": "dare/1", "drop": 0.95}],
                "description": "codecs in order, each with its own options beside `codec`",
            },
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        left, made = x, []
        for stage in options["stages"]:
            codec, given = self._stage(key, stage)
            made.append((codec, coded_with(codec, left, key, inputs, given)))
            left = left - codec.decode(made[-1][1], x.shape, key, 0, x.size).reshape(x.shape)
        return joined(made)

    def room(self, shape: tuple[int, ...], **options: Any) -> int:
        stages = options.get("stages") or [options.get("quantiser") or {"codec": "group/1"}, {"codec": "lowrank/1"}]
        needs = (getattr(lossy_codec(s["codec"]), "room", None) for s in stages)
        return 12 * int(np.prod(shape)) + max(need(shape) if need else 0 for need in needs)

    def _stage(self, key: str, stage: Mapping[str, Any]) -> tuple[Lossy, dict[str, Any]]:
        codec = lossy_codec(stage["codec"])
        if isinstance(codec, Hybrid):
            raise self.refuse(key, "has a stage that is a hybrid itself", hint="list its stages")
        return codec, {k: v for k, v in stage.items() if k != "codec"}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        stages = coded.facts["stages"]
        if not 1 <= len(stages) <= _MOST:
            raise ValueError(f"{len(stages)} stages")
        total = np.zeros(stop - start, np.float32)
        for i, stage in enumerate(stages):
            codec, _ = self._stage(key, stage)
            parts = {n[2:]: p for n, p in coded.parts.items() if n.startswith(f"{i}.")}
            total += codec.decode(Coded(parts, stage["facts"]), shape, key, start, stop)
        return total


def coded_with(codec: Lossy, delta: Array, key: str, inputs: Inputs | None, options: Mapping[str, Any]) -> Coded:
    """A delta coded, fitted to a layer's inputs where they are known and the codec can make use of them."""
    given = {"inputs": inputs} if inputs is not None and getattr(codec, "calibrated", False) else {}
    return codec.encode(delta, key=key, **given, **options)


def joined(made: Sequence[tuple[Lossy, Coded]]) -> Parts:
    """The parts of all stages, named `0.codes`, and their facts in order."""
    parts = {f"{i}.{n}": p for i, (_, coded) in enumerate(made) for n, p in coded.parts.items()}
    return parts, {"stages": [{"codec": codec.name, "facts": dict(coded.facts)} for codec, coded in made]}


@lossy
class LoftQ(Hybrid):
    name = "loftq/1"
    matrix = True
    options = MappingProxyType(
        {
            "rank": {"type": "integer", "minimum": 1, "default": 8, "description": "rank of the low-rank part"},
            "quantiser": {
                **STAGE,
                "default": {"codec": "group/1", "bits": 2, "scale": "l2"},
                "description": "codec of the other part, with its options",
            },
            "rounds": {
                "type": "integer",
                "minimum": 1,
                "maximum": 100,
                "default": 5,
                "description": "alternations; the best is kept",
            },
            "start": {"enum": ["svd", "quantise"], "default": "svd", "description": "which part is fitted first"},
            "factors": {
                "enum": ["float16", "int8"],
                "default": "float16",
                "description": "how the low-rank factors are stored",
            },
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        quantiser, given = self._stage(key, options["quantiser"])
        low = lossy_codec("lowrank/1")
        kept: tuple[float, list[tuple[Lossy, Coded]]] | None = None
        codes: tuple[Coded, Array] | None = None
        factors: tuple[Coded, Array] | None = None
        for _ in range(options["rounds"]):
            for part in ("svd", "quantise") if options["start"] == "svd" else ("quantise", "svd"):
                if part == "svd":
                    rest = x if codes is None else x - codes[1]
                    made = coded_with(low, rest, key, inputs, {"rank": options["rank"], "factors": options["factors"]})
                    factors = made, low.decode(made, x.shape, key, 0, x.size).reshape(x.shape)
                else:
                    made = coded_with(quantiser, x if factors is None else x - factors[1], key, inputs, given)
                    codes = made, quantiser.decode(made, x.shape, key, 0, x.size).reshape(x.shape)
                if codes is None or factors is None:
                    continue
                rest = (x - codes[1] - factors[1]).astype(np.float64)
                error = float(np.square(rest).sum()) if inputs is None else inputs.harm(rest)
                if kept is None or error < kept[0]:
                    kept = error, [(quantiser, codes[0]), (low, factors[0])]
        assert kept is not None
        return joined(kept[1])
