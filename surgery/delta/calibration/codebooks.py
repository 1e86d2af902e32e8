"""Training codebooks, and which word stands for which vector, so that outputs match the fine-tuned model's.

PV-Tuning (arXiv:2405.14852): what is continuous (words, scales of rows) is trained by gradients (P); some vectors get other
words (V): the word nearest to where a step of Adam would lead, where the loss should fall most for it. New words stay if the
loss on a few fixed texts does fall; else fewer vectors are moved at the next attempt. Attempts begin halfway: gradients do
better alone before, and what moves beneath them puts them off. The paper takes the largest steps, up to 1 % of vectors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.delta.calibration.data import Texts, Tuned
from surgery.delta.calibration.fit import Fitted
from surgery.delta.calibration.training import QUIET, Step, Teacher, measured, train
from surgery.delta.codecs.base import Coded
from surgery.delta.deltas import Deltas
from surgery.delta.lossy import vq
from surgery.delta.lossy.common import rows_of

_EVERY, _FROM = 2, 0.5  # steps from attempt to attempt; share of all steps after which they begin
_SHARE, _MOST, _MORE, _LESS = 0.001, 0.01, 1.5, 0.5  # of vectors that get other words at once: first, at most, how it goes on
_LOOKED_AT = 0.04  # share of a matrix's vectors (1000 at least) that new words are sought for: the steepest
_FEW = 8  # that are not tried again where they did not help
_FAR = 0.5  # how far a vector would go, in root mean squares of words, where its gradient is the same in every step
_DECAYS = 0.9, 0.95  # of the moments of gradients
_JUDGES = 16  # texts that judge an attempt


@dataclass
class _Matrix:
    """One tensor, as torch has it: words (books, words, dims), logarithms of rows' factors, indices (rows, vectors, books)."""

    base: Any
    words: Any
    logs: Any
    index: Any
    scales: Any
    length: int
    barred: Any  # (rows, vectors): where other words did not help
    mean: Any = None  # of gradients
    square: Any = None  # of their squares

    def delta(self) -> Any:
        from torch.nn.functional import embedding

        total: Any = sum(embedding(self.index[:, :, b], self.words[b]) for b in range(len(self.words)))
        return total.reshape(len(total), -1)[:, : self.length] * (self.scales * self.logs.exp())[:, None]


def tune_codebooks(
    fitted: Fitted,
    deltas: Deltas,
    tuned: Tuned,
    texts: Texts,
    *,
    steps: int = 100,
    rate: float = 2e-2,
    move: bool = True,
    step: Step = QUIET,
) -> int:
    """Train every `vq` code in `fitted`, in place. rate: of logarithms of scales, and of words in units of their root mean
    square. move: give vectors other words (V), else P alone. Returns how many tensors."""
    import torch

    coded = {n: one for n, (codec, one) in fitted.codes.items() if codec.name == vq.VQ.name}
    names = [n for n, one in coded.items() if n in tuned.parameters and one.parts]
    if not names:
        return 0
    teacher, all_of = Teacher(tuned, deltas, names), dict[str, _Matrix]()
    for n in names:
        given = vq.stored(coded[n], deltas.shape(n))
        words = torch.from_numpy(given.books.values.astype(np.float32)).requires_grad_()
        all_of[n] = _Matrix(
            torch.from_numpy(deltas.base(n)), words, torch.zeros(len(given.scales), requires_grad=True),
            torch.from_numpy(given.index), torch.from_numpy(given.scales.astype(np.float32)), rows_of(deltas.shape(n))[1],
            torch.zeros(given.index.shape[:2], dtype=torch.bool),
        )  # fmt: skip
    built: dict[str, Any] = {}  # deltas with their graphs, and
    leaves: dict[str, Any] = {}  # the same without: gradients of all texts of a step meet there, and go on from there at once

    def weights() -> dict[str, Any]:
        deltas_now = leaves
        if not torch.is_grad_enabled():
            deltas_now = {n: one.delta() for n, one in all_of.items()}
        elif not leaves:
            built.update({n: one.delta() for n, one in all_of.items()})
            leaves.update({n: delta.detach().requires_grad_() for n, delta in built.items()})
        return {teacher.paths[n]: one.base + deltas_now[n].reshape(one.base.shape) for n, one in all_of.items()}

    moves = _Moves(teacher, list(all_of.values()), texts.fit[:_JUDGES], weights)

    def before() -> None:
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
        torch.autograd.backward(list(built.values()), gradients)
        if move:
            moves.follow(gradients)
        built.clear()
        leaves.clear()

    def after(done: int) -> None:
        if move and done % _EVERY == 0 and done > _FROM * steps:
            moves.attempt()

    rates = {one.words: rate * max(float(one.words.detach().square().mean().sqrt()), 1e-8) for one in all_of.values()}
    rates |= {one.logs: rate for one in all_of.values()}
    also = [one.index for one in all_of.values()]
    train(teacher, texts, rates, weights, steps=steps, step=step, also=also, before=before, after=after)
    for n, one in all_of.items():
        codec = fitted.codes[n][0]
        books = vq.Books.rounded(one.words.detach().double().numpy())
        scales = (one.scales * one.logs.detach().exp()).double().numpy()
        parts, facts = vq.parts_of(vq.Vectors(books, one.index.numpy(), scales), 1.0)
        fitted.codes[n] = codec, measured(codec, Coded(parts, facts), deltas.delta(n), n)
        tuned.hold(n, deltas.rebuilt(n, *fitted.codes[n]))
    return len(names)


class _Moves:
    """V-steps. share: of all vectors, that get other words at once."""

    def __init__(self, teacher: Teacher, matrices: list[_Matrix], judges: Sequence[Any], weights: Callable[[], Any]) -> None:
        self._teacher, self._matrices, self._judges, self._weights = teacher, matrices, judges, weights
        self._share = _SHARE

    def follow(self, gradients: Sequence[Any]) -> None:
        """Moments of the gradients of deltas."""
        for one, gradient in zip(self._matrices, gradients, strict=True):
            square = gradient.square()
            one.mean = gradient if one.mean is None else one.mean.lerp(gradient, 1.0 - _DECAYS[0])
            one.square = square if one.square is None else one.square.lerp(square, 1.0 - _DECAYS[1])

    def attempt(self) -> None:
        import torch

        with torch.no_grad():
            before = [one.index.clone() for one in self._matrices]
            proposed = [self._proposed(one) for one in self._matrices]
            gains = torch.cat([gain for _, gain in proposed])
            live = int((gains > 0).sum())
            if live == 0:
                return
            least = torch.topk(gains, max(1, min(live, round(self._share * len(gains))))).values[-1]
            loss = self._loss()
            chosen = [(g >= least).reshape(one.index.shape[:2]) for one, (_, g) in zip(self._matrices, proposed, strict=True)]
            for one, (index, _), here in zip(self._matrices, proposed, chosen, strict=True):
                one.index[here] = index[here]
            if self._loss() < loss:
                self._share = min(self._share * _MORE, _MOST)
                return
            few = sum(int(here.sum()) for here in chosen) <= _FEW
            for one, index, here in zip(self._matrices, before, chosen, strict=True):
                one.index.copy_(index)
                if few:
                    one.barred |= here
            self._share *= _LESS

    def _proposed(self, one: _Matrix) -> tuple[Any, Any]:
        """(indices, by how much the loss would fall, of every vector): 0 where the word stays. Of a parabola that is lowest
        where a step of Adam would lead."""
        import torch

        rows, count, _ = one.index.shape
        dims = one.words.shape[2]

        def vectors(flat: Any) -> Any:
            padded = torch.zeros(rows, count * dims)
            padded[:, : one.length] = flat
            return padded.reshape(rows, count, dims)

        by, reach = one.scales * one.logs.exp(), _FAR * one.words.square().mean().sqrt()
        slope, bend = (vectors(m) * by[:, None, None] for m in (one.mean, one.square.sqrt()))
        pace = reach * slope / (bend + 1e-30)
        hope = torch.where(one.barred, 0.0, (pace * slope).sum(dim=2)).reshape(-1)
        some = torch.topk(hope, min(len(hope), max(1000, round(_LOOKED_AT * len(hope))))).indices
        before = one.index.reshape(len(hope), -1)
        now = sum(one.words[b][before[some, b]] for b in range(len(one.words)))
        wanted = (now - pace.reshape(-1, dims)[some]).double().numpy()
        index = before.clone()
        index[some] = torch.from_numpy(vq.indices(wanted, one.words.double().numpy()))
        move = now - sum(one.words[b][index[some, b]] for b in range(len(one.words)))
        slope, bend = (m.reshape(-1, dims)[some] for m in (slope, bend))
        gain = torch.zeros(len(hope))
        gain[some] = (move * slope - 0.5 * move.square() * bend / reach).sum(dim=1).clamp_min(0.0)
        gain[one.barred.reshape(-1)] = 0.0
        return index.reshape(one.index.shape), gain

    def _loss(self) -> float:
        made = self._weights()
        return float(sum(self._teacher.loss(ids, made) for ids in self._judges))
