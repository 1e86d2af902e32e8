"""Which points are tried: all of a grid, or what optuna's samplers propose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from surgery.errors import Refused
from surgery.lab.space import Search
from surgery.lab.trials import STUDY, Trial, Trials, goal_values


def grid(search: Search, trials: Trials) -> None:
    for params in search.grid():
        trials.evaluate(params)


def sampled(search: Search, trials: Trials, folder: Path) -> None:
    """TPE or CMA-ES until `trials` points are done. The study is a SQLite file that optuna's own tools read.

    Every proposal is seeded by its number, so a sweep that was killed goes on as if it had not been.
    """
    try:
        import optuna
    except ImportError:
        raise Refused(f"method {search.method} needs optuna", hint="pip install 'weight-surgery[lab]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    several = len(search.goals) > 1 and search.method == "tpe"
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY).resolve()}",
        study_name="sweep",
        directions=["maximize"] * (len(search.goals) if several else 1),
        load_if_exists=True,
    )
    space = {d.name: d.distribution() for d in search.dimensions}
    states = optuna.trial.TrialState

    def told(number: int, trial: Trial) -> None:
        if trial.score is None:
            study.tell(number, state=states.FAIL)
        else:
            study.tell(number, goal_values(trial, trials.goals) if several else trial.score)

    for before in study.get_trials(deepcopy=False):
        if before.state == states.COMPLETE or (before.state == states.FAIL and before.params.keys() == space.keys()):
            trials.evaluate(dict(before.params))
        elif before.state == states.RUNNING and before.params.keys() == space.keys():
            told(before.number, trials.evaluate(dict(before.params)))
        elif before.state == states.RUNNING:  # killed while it was being proposed
            study.tell(before.number, state=states.FAIL)
    while len(trials.done) < search.trials:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optuna's experimental features
            study.sampler = _sampler(search, len(study.get_trials(deepcopy=False)))
            asked = study.ask(space)
        told(asked.number, trials.evaluate(dict(asked.params)))


def _sampler(search: Search, number: int) -> Any:
    import optuna

    if search.method == "tpe":
        startup = min(10, max(3, search.trials // 3))
        return optuna.samplers.TPESampler(seed=search.seed * 100_003 + number, multivariate=True, n_startup_trials=startup)
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise Refused("method cmaes needs the package cmaes", hint="pip install 'weight-surgery[lab]'") from None
    return optuna.samplers.CmaEsSampler(seed=search.seed, warn_independent_sampling=False)
