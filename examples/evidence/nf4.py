"""NormalFloat4 with double quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from evidence.claims import Claim, Figures
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.nf4 import LEVELS

TITLE = "NF4"
SOURCE = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314."
RIG = ""
CLAIMS = [
    Claim(
        "The 16 levels are the scaled normal quantiles of the paper, with an exact zero.",
        "−1, −.6962, −.5251 … .5626, .7230, 1",
        "largest difference from the formula {off:e}",
        "≤ 1e-4, and 0 is a level",
        lambda f: f.off <= 1e-4 and f.zero == 1,
    ),
    Claim(
        "Double quantisation brings it to 4.127 bits per weight.",
        "4 + 8/64 + 32/(64 · 256) = 4.127",
        "{bits:3}",
        "within 0.001",
        lambda f: abs(f.bits - 4.127) <= 1e-3,
    ),
    Claim(
        "On normal weights its error is below that of 4-bit integers with a scale per block.",
        "better perplexity than FP4 and Int4",
        "relative error NF4 {nf4}, integers {integers} (blocks of 64)",
        "NF4 < integers, NF4 from 0.088 to 0.096",
        lambda f: f.nf4 < f.integers and 0.088 <= f.nf4 <= 0.096,
    ),
]


def measure(seed: int) -> Figures:
    edge = 0.9677083
    quantiles = np.concatenate([np.linspace(1 - edge, 0.5, 8), np.linspace(0.5, edge, 9)[1:]])
    expected = np.sort(ndtri(quantiles))
    weights = np.random.default_rng(seed).standard_normal((512, 512)).astype(np.float32)
    coded = lossy_codec("nf4").encode(weights, key="w", scale="l2")
    whole = lossy_codec("group").encode(weights, key="w", bits=4, group=64, scale="l2")
    return {
        "off": float(np.abs(expected / np.abs(expected).max() - LEVELS).max()),
        "zero": int(0.0 in LEVELS),
        "bits": coded.facts["bits"],
        "nf4": coded.facts["error"]["rel_fro"],
        "integers": whole.facts["error"]["rel_fro"],
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.stem(LEVELS, np.ones(len(LEVELS)))
    x = np.linspace(-1, 1, 200)
    axes.plot(x, np.exp(-((x / 0.35) ** 2) / 2), color="C1", label="density of block-scaled normal weights (sketch)")
    axes.set_xlabel("level")
    axes.set_yticks([])
