"""What a claim is, what was found for it over several seeds, and whether it reproduces."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

Figures = Mapping[str, Any]  # of one seed: name -> number, or a curve for the plot


class Script(Protocol):
    """What a file of this folder holds. RIG: "digits", "characters", or "" where nothing is trained. measure: the figures of
    one seed. draw: the plot of all of them."""

    __name__: str
    TITLE: str
    SOURCE: str
    RIG: str
    CLAIMS: Sequence[Claim]

    def measure(self, rig: Any) -> Figures: ...

    def draw(self, axes: Any, found: Sequence[Figures]) -> None: ...


@dataclass(frozen=True)
class Claim:
    """says: the claim. paper: the paper's own figure. here: what is shown of ours, names of figures in braces: `{base}`,
    `{ratio:1}` with one decimal, `{norm:e}`. holds: whether it is so in one seed's figures; test: the same in words."""

    says: str
    paper: str
    here: str
    test: str
    holds: Callable[[Any], bool]


class Named(dict[str, Any]):
    """Figures as attributes, for `holds`."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True)
class Verdict:
    """In how many of how many seeds a claim held."""

    held: int
    seeds: int

    @property
    def reproduces(self) -> str:
        if self.held == self.seeds:
            return "yes"
        return "no" if self.held == 0 else f"in {self.held} of {self.seeds}"


def verdict(claim: Claim, found: Sequence[Figures]) -> Verdict:
    return Verdict(sum(bool(claim.holds(Named(f))) for f in found), len(found))


@dataclass(frozen=True)
class Spread:
    """A figure over seeds, as it is shown: mean ± standard deviation."""

    values: tuple[float, ...]

    def __format__(self, how: str) -> str:
        mean = float(np.mean(self.values))
        wide = float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan
        if how == "e":
            shown, by = f"{mean:.1e}", ""
        else:
            digits = int(how or 3)
            shown, by = f"{mean:.{digits}f}", f"{wide:.{digits}f}"
        if len(self.values) < 2 or not by or len(set(self.values)) == 1:
            return _short(shown)
        return f"{_short(shown)} ± {_short(by)}"


def _short(number: str) -> str:
    return number.replace("0.", ".", 1) if number.startswith(("0.", "-0.")) else number


def here(claim: Claim, found: Sequence[Figures]) -> str:
    """Our figures for a claim, filled in."""
    names = {name for _, name, _, _ in string.Formatter().parse(claim.here) if name}
    return claim.here.format(**{n: Spread(tuple(float(f[n]) for f in found)) for n in names})


def script(module: ModuleType) -> Script:
    """The module as what it must be. Raises TypeError where it lacks something."""
    lacking = [n for n in ("TITLE", "SOURCE", "RIG", "CLAIMS", "measure", "draw") if not hasattr(module, n)]
    if lacking:
        raise TypeError(f"{module.__name__} has no {', '.join(lacking)}")
    return cast(Script, module)


def mean_curve(found: Sequence[Figures], name: str) -> Any:
    """A curve averaged over seeds."""
    return np.mean([f[name] for f in found], axis=0)
