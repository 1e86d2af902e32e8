"""Lossy codecs of deltas, one family per file. Importing this package registers them in `surgery.delta.codecs.base.LOSSY`."""

from surgery.delta.lossy import (  # noqa: F401
    columns,
    dare,
    delta_come,
    dither,
    group,
    hadamard,
    hybrid,
    lowrank,
    nf4,
    plain,
    quantile,
    rounded,
    sign,
    sparse,
    sparse24,
    summed,
    svd_wf,
    ternary,
    two_level,
    vq,
)
