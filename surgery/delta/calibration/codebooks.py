"""Training codebooks, and which word stands for which vector, so that outputs match the fine-tuned model's.

PV-Tuning (arXiv:2405.14852): what is continuous (words, scales of rows) is trained by gradients (P); every few steps some
vectors get other words (V). Those are the vectors that a step of Adam would move furthest, at most 1 % at once; each gets the
word nearest to where it would go. New words stay where the loss on a few fixed texts falls; else the next attempt is shorter.
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

_EVERY, _SHARE = 2, 0.01  # steps from attempt to attempt; of the vectors that get other words at once
_DECAY, _FURTHER, _LESS = 0.95, 1.3, 0.6  # of second moments; factors of how far an attempt goes
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
    moment: Any = None

    def delta(self) -> Any:
        total = sum(self.words[b][self.index[:, :, b]] for b in range(len(self.words)))
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
        )  # fmt: skip
    seen: dict[str, list[Any]] = {n: [] for n in names}

    def weights() -> dict[str, Any]:
        made = {}
        for n, one in all_of.items():
            delta = one.delta()
            if delta.requires_grad and torch.is_grad_enabled():
                delta.retain_grad()
                seen[n].append(delta)
            made[teacher.paths[n]] = one.base + delta.reshape(one.base.shape)
        return made

    moves = _Moves(teacher, list(all_of.values()), texts.fit[:_JUDGES], weights)

    def after(done: int) -> None:
        gradients = [sum(d.grad for d in seen[n]) for n in names]
        for held in seen.values():
            held.clear()
        moves.follow(gradients)
        if move and done % _EVERY == 0:
            moves.attempt(gradients)

    rates = {one.words: rate * max(float(one.words.detach().square().mean().sqrt()), 1e-8) for one in all_of.values()}
    rates |= {one.logs: rate for one in all_of.values()}
    train(teacher, texts, rates, weights, steps=steps, step=step, also=[one.index for one in all_of.values()], after=after)
    for n, one in all_of.items():
        codec = fitted.codes[n][0]
        books = vq.Books.rounded(one.words.detach().double().numpy())
        scales = (one.scales * one.logs.detach().exp()).double().numpy()
        parts, facts = vq.parts_of(vq.Vectors(books, one.index.numpy(), scales), deltas.shape(n), 1.0)
        fitted.codes[n] = codec, measured(codec, Coded(parts, facts), deltas.delta(n), n)
        tuned.hold(n, deltas.rebuilt(n, *fitted.codes[n]))
    return len(names)


class _Moves:
    """V-steps. far: how far a vector goes at once, in units of the root mean square of words."""

    def __init__(self, teacher: Teacher, matrices: list[_Matrix], judges: Sequence[Any], weights: Callable[[], Any]) -> None:
        self._teacher, self._matrices, self._judges, self._weights = teacher, matrices, judges, weights
        self._far, self.taken, self.tried = 0.5, 0, 0

    def follow(self, gradients: Sequence[Any]) -> None:
        """Second moments of the gradients of deltas."""
        for one, gradient in zip(self._matrices, gradients, strict=True):
            square = gradient.square()
            one.moment = square if one.moment is None else one.moment.lerp(square, 1.0 - _DECAY)

    def attempt(self, gradients: Sequence[Any]) -> None:
        import torch

        with torch.no_grad():
            before = [one.index.clone() for one in self._matrices]
            proposed = [self._proposed(one, g) for one, g in zip(self._matrices, gradients, strict=True)]
            lengths = torch.cat([length for _, _, length in proposed])
            live = int((lengths > 0).sum())
            if live == 0:
                return
            least = torch.topk(lengths, max(1, min(live, round(_SHARE * len(lengths))))).values[-1]
            loss = self._loss()
            for one, (index, _, length) in zip(self._matrices, proposed, strict=True):
                chosen = ((length >= least) & (length > 0)).reshape(one.index.shape[:2])
                one.index[chosen] = index[chosen]
            self.tried += 1
            if self._loss() < loss:
                self.taken += 1
                self._far = min(self._far * _FURTHER, 4.0)
                return
            for one, index in zip(self._matrices, before, strict=True):
                one.index.copy_(index)
            self._far *= _LESS

    def _proposed(self, one: _Matrix, gradient: Any) -> tuple[Any, Any, Any]:
        """(indices, where vectors would go, how far: 0 where the word stays)."""
        import torch

        rows, count, _ = one.index.shape
        dims = one.words.shape[2]
        now = sum(one.words[b][one.index[:, :, b]] for b in range(len(one.words)))
        pace = self._far * one.words.square().mean().sqrt() * gradient / (one.moment.sqrt() + 1e-30)
        padded = torch.zeros(rows, count * dims)
        padded[:, : one.length] = pace
        move = padded.reshape(rows, count, dims)
        wanted = (now - move).reshape(-1, dims).double().numpy()
        index = torch.from_numpy(vq.indices(wanted, one.words.double().numpy())).reshape(one.index.shape)
        stays = (index == one.index).all(dim=2)
        return index, wanted, torch.where(stays, torch.zeros(()), move.norm(dim=2)).reshape(-1)

    def _loss(self) -> float:
        made = self._weights()
        return float(sum(self._teacher.loss(ids, made) for ids in self._judges))
