"""Overlap of skills: masks over a model, against sorting everything at once."""

from pathlib import Path

import numpy as np
import pytest
from helpers import BF16, llama_config, llama_tensors, write_checkpoint

from surgery.analysis.overlap import overlap
from surgery.errors import Refused
from surgery.inputs import open_node


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, rng = tmp_path_factory.mktemp("overlap"), np.random.default_rng(0)
    base = llama_tensors(0, hidden=24, vocab=30)
    write_checkpoint(made / "base", base, config=llama_config(hidden=24, vocab=30))
    for i, name in enumerate(("a", "b", "c")):
        tensors = {}
        for n, x in base.items():
            move = rng.standard_normal(x.shape) * (0.2 if "layers.1" in n else 0.05)
            if i == 2:
                move = np.where(rng.random(x.shape) < 0.01, move, 0.0)  # a sparse one
            tensors[n] = (x.astype(np.float32) + move.astype(np.float32)).astype(BF16)
        write_checkpoint(made / name, tensors, config=llama_config(hidden=24, vocab=30))
    return made


def flat(folder: Path, name: str, skip: str = "-") -> np.ndarray:
    from helpers import read_checkpoint

    base, tuned = read_checkpoint(folder / "base"), read_checkpoint(folder / name)
    return np.concatenate([(tuned[n].astype(np.float32) - base[n].astype(np.float32)).ravel() for n in base if skip not in n])


def nodes(folder: Path, *names: str):
    return open_node(str(folder / "base")), [open_node(str(folder / n)) for n in names]


@pytest.mark.parametrize("share", [0.003, 0.05, 0.5, 1.0])
def test_the_share_that_moved_most(folder: Path, share: float) -> None:
    found = overlap(*nodes(folder, "a", "b"), share=share, threads=2)
    moves = [np.abs(flat(folder, n)) for n in ("a", "b")]
    masks = [(m >= np.sort(m)[::-1][max(1, int(share * len(m))) - 1]) & (m > 0) for m in moves]
    assert found.elements == len(moves[0])
    assert found.common == [[int((x & y).sum()) for y in masks] for x in masks]
    assert found.matrix[0][1] == pytest.approx((masks[0] & masks[1]).sum() / masks[0].sum())
    assert found.chance[0][1] == pytest.approx(masks[1].mean())


def test_everything_that_changed(folder: Path) -> None:
    found = overlap(*nodes(folder, "a", "c"))
    moves = [flat(folder, n) != 0 for n in ("a", "c")]
    assert found.common == [[int((x & y).sum()) for y in moves] for x in moves] and found.common[1][1] < 0.02 * found.elements
    layers = {layer: (size, common) for layer, (size, common) in found.by_layer.items()}
    assert sum(size for size, _ in layers.values()) == found.elements
    assert np.array_equal(np.sum([c for _, c in layers.values()], axis=0), found.common)
    said = found.as_dict()
    assert said["sizes"] == [found.common[0][0], found.common[1][1]] and said["by_layer"][0]["layer"] == next(iter(layers))


def test_a_mask_that_is_empty(folder: Path) -> None:
    found = overlap(*nodes(folder, "base", "a"), share=0.1)
    assert found.common[0] == [0, 0] and found.matrix[0] == [None, None] and found.matrix[1][0] == 0.0


def test_names_that_count_and_what_is_refused(folder: Path) -> None:
    base, models = nodes(folder, "a", "b")
    found = overlap(base, models, share=0.1, exclude=["*embed*", "lm_head*"])
    assert found.elements == len(flat(folder, "a")) - 2 * 24 * 30
    with pytest.raises(Refused, match="two or more models, got 1"):
        overlap(base, models[:1])
    with pytest.raises(Refused, match="no tensor of floats is left"):
        overlap(base, models, only=["nothing"])
    with pytest.raises(Refused, match="share must be above 0"):
        overlap(base, models, share=0.0)
