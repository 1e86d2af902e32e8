"""What `pack` needs to make a calibrated package, or to say what a package does to outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import DType
from surgery.delta.calibration.data import Texts, Tuned, read_texts, statistics_of, tuned_model
from surgery.delta.calibration.fit import Fitted, fit_to_statistics, fit_to_texts, planned
from surgery.delta.calibration.probe import Probe
from surgery.delta.calibration.sensitivity import sensitivities
from surgery.delta.deltas import Deltas
from surgery.delta.entries import unknown
from surgery.delta.lossy.hybrid import Hybrid
from surgery.delta.pack import Choose
from surgery.delta.rebuild import stored_tensors
from surgery.errors import Refused
from surgery.graph.node import Node
from surgery.statistics.node import StatisticsNode

Step = Callable[[str, int, int], None]  # (what is done, how much of it, of how much)
_QUIET: Step = lambda what, done, total: None  # noqa: E731


@dataclass
class Calibration:
    """A file of texts, or Gram matrices, and what to do with them. repair: rank of a trained low-rank part on top, 0: none.

    steps: of training scales and repairs, None: as many as each needs.
    """

    base: Node
    model: Node
    deltas: Deltas
    texts: Texts | None = None
    tuned: Tuned | None = None
    grams: StatisticsNode | None = None
    repair: int = 0
    steps: int | None = None
    step: Step = _QUIET

    def weights(self, names: set[str]) -> dict[str, float]:
        """What a squared error of each matrix does to the model's outputs, over the mean of all. With texts it is measured;
        Gram matrices alone do not tell, and all are alike: {}."""
        if self.texts is None or self.tuned is None:
            return {}
        found = sensitivities(self.deltas, self.tuned, self.texts.fit, names, lambda i, n: self.step("weighing layers", i, n))
        live = [v for v in found.values() if v > 0.0]
        mean = float(np.exp(np.mean(np.log(live)))) if live else 1.0
        return {n: (found.get(n) or mean) / mean for n in names}

    def fit(self, choose: Choose) -> Fitted:
        """Codes of all chosen tensors. Raises Refused where options and data do not go together."""
        plan = planned(self.deltas, unknown(stored_tensors(self.model)), choose)
        for codec, options in plan.values():
            if options.get("max_error") is not None:
                raise Refused(
                    "--max-error and --calib do not go together: feedback moves single weights further than a step",
                    hint="give --bits or --size, or leave --calib out",
                )
            if self.repair and isinstance(codec, Hybrid):
                raise Refused(f"--repair puts a second stage on a codec; {codec.name} has some already")
        if self.grams is not None:
            if self.repair:
                raise Refused("--repair trains on texts; Gram matrices do not do", hint="give a file of texts to --calib")
            return fit_to_statistics(self.deltas, plan, self.grams, lambda i, n: self.step("fitting", i, n))
        assert self.tuned is not None and self.texts is not None
        made = fit_to_texts(self.deltas, plan, self.tuned, self.texts.fit, lambda i, n: self.step("fitting", i, n))
        self._train(made)
        return made

    def _train(self, fitted: Fitted) -> None:
        from surgery.delta.calibration.distil import distil_scales, repair

        assert self.tuned is not None and self.texts is not None
        given: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
        what = (fitted, self.deltas, self.tuned, self.texts)
        distil_scales(*what, step=lambda i, n: self.step("distilling scales", i, n), **given)
        if self.repair:
            repair(*what, rank=self.repair, step=lambda i, n: self.step("repairing", i, n), **given)

    def restore(self, fitted: Fitted) -> None:
        """Put the fine-tuned weights back into the live model."""
        if self.tuned is not None:
            for name in fitted.codes:
                if name in self.tuned.parameters:
                    self.tuned.hold(name, self.deltas.tuned(name))

    def facts(self, fitted: Fitted) -> dict[str, Any]:
        """What the manifest says of the data, and how many tensors were fitted to it, by codec."""
        counts = Counter(codec.name for n, (codec, _) in fitted.codes.items() if n not in fitted.blind)
        if self.texts is not None:
            return {**self.texts.facts(self.texts.fit), "fitted": dict(counts)}
        assert self.grams is not None
        said = self.grams.manifest
        data = {"file": said.data.get("file", ""), "sha256": said.data.get("sha256", "0" * 64)}
        return {**data, "texts": said.samples, "tokens": said.tokens, "fitted": dict(counts)}


@contextmanager
def calibration(
    base: Node,
    model: Node,
    data: str | None,
    *,
    samples: int = 128,
    length: int = 512,
    repair: int = 0,
    steps: int | None = None,
    step: Step = _QUIET,
) -> Iterator[Calibration]:
    """Open calibration data: texts (.txt, .jsonl), or a directory that `surgery statistics --kind gram` wrote.

    samples, length: texts at most, and tokens of each. Raises Refused. data None: nothing to calibrate on, only to probe.
    """
    with Deltas(base, model) as deltas:
        made = Calibration(base, model, deltas, repair=repair, steps=steps, step=step)
        if data is not None:
            made.grams = statistics_of(data, model)
            if made.grams is None:
                made.tuned = tuned_model(model)
                made.texts = read_texts(data, made.tuned, samples=samples, length=length)
        yield made


@dataclass
class Witness:
    """What `pack` shows rebuilt tensors to: measures outputs where there is a probe, and says what was calibrated on."""

    probe: Probe | None = None
    calibration: Mapping[str, Any] | None = None

    def see(self, name: str, dtype: DType, start: int, raw: Any) -> None:
        if self.probe is not None:
            self.probe.see(name, dtype, start, raw)

    def conclude(self) -> dict[str, Any]:
        made = {} if self.probe is None else {"evaluation": self.probe.conclude()}
        return made | ({} if self.calibration is None else {"calibration": dict(self.calibration)})


def witness(made: Calibration, fitted: Fitted | None, probe: str | None, *, samples: int = 64, length: int = 512) -> Witness:
    """Measures outputs on the texts of `probe`, else on those kept back from calibration, if there are any."""
    texts = made.texts
    if probe is not None:
        made.tuned = made.tuned or tuned_model(made.model)
        found = read_texts(probe, made.tuned, samples=samples, length=length)
        mine = [*found.fit, *(found.probe if found.held_out else [])][:samples]
        known = {tuple(ids) for ids in made.texts.fit} if made.texts is not None else set()
        texts = Texts(found.file, found.sha256, [], mine, not any(tuple(ids) in known for ids in mine))
    if fitted is not None:
        made.restore(fitted)
    looks = None if texts is None or made.tuned is None else Probe(made.tuned, texts, made.deltas)
    return Witness(looks, None if fitted is None else made.facts(fitted))
