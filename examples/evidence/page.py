"""docs/evidence.md, as run.py prints it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from evidence.claims import Figures, Script, Verdict, here, verdict

RIGS = {"digits": "digits", "characters": "characters", "": "no model"}


def page(scripts: Mapping[str, Script], found: Mapping[str, Sequence[Figures]]) -> str:
    import torch

    counts = sorted({len(f) for f in found.values()})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds, as each section says"
    verdicts = {(n, c.says): verdict(c, found[n]) for n, s in scripts.items() for c in s.CLAIMS}
    whole = sum(v.reproduces == "yes" for v in verdicts.values())
    lines = [
        "# Evidence",
        "",
        "Published claims about weight surgery, tried again with this tool on a small rig. This page is printed by",
        "",
        "```",
        "python examples/evidence/run.py > docs/evidence.md      # no network, no download",
        "```",
        "",
        "which also draws a plot for each. Figures are means ± standard deviations over "
        f"{seeds} (a seed draws the split, the initial weights and the order of examples), and *reproduces* says whether "
        "the test in the last column but one holds in all of them (yes), in none (no), or in how many.",
        "",
        f"Of {len(verdicts)} claims {whole} reproduce in every seed. Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}; other versions and processors move the last digits.",
        "",
        "* *digits*: a residual MLP of six blocks (105,162 parameters) on 8 x 8 digits in five domains: clean, "
        "rot90, rot180, inv, "
        "perm. The base sees 150 examples of each, fine-tunes up to 1000 of one, with a frozen head; the other "
        "domains are then "
        "the control. 497 test examples per domain: one of them is 0.002. Weights and settings are chosen on 300 others.",
        "* *characters*: a Llama of six blocks (width 32, 60,000 parameters) that reads the standard library's sources "
        "character by character. The base sees `json`, `email`, `asyncio`, `http` and `logging`, fine-tunes one other package. "
        "Figures are bits per character on 100 held-out texts of 64.",
        "",
        "What holds for models this small need not hold for large ones, and what fails here may work there. A *no* "
        "says that the "
        "claim cannot be seen at this scale, or that it depends on what this scale has not: it is no refutation.",
        "",
        "Learning rates and some of the margins in the tests were set after first results on this rig; so a *yes* is weaker "
        "than a prediction that came true. Figures of papers are quoted, some from secondary sources: look them up before "
        "you rely on them.",
        "",
    ]
    lines += _failing(scripts, verdicts)
    for name, shown in scripts.items():
        lines += _section(name, shown, found[name])
    return "\n".join(lines)


def _failing(scripts: Mapping[str, Script], verdicts: Mapping[tuple[str, str], Verdict]) -> list[str]:
    rows = [
        (shown.TITLE, claim.says, verdicts[name, claim.says])
        for name, shown in scripts.items()
        for claim in shown.CLAIMS
        if verdicts[name, claim.says].reproduces != "yes"
    ]
    if not rows:
        return []
    lines = ["## What does not reproduce here", "", "| | claim | reproduces |", "|---|---|---|"]
    return [*lines, *(f"| {t} | {s} | {v.reproduces} |" for t, s, v in rows), ""]


def _section(name: str, shown: Script, found: Sequence[Figures]) -> list[str]:
    lines = [f"## {shown.TITLE}", "",
             f"{shown.SOURCE} Rig: {RIGS[shown.RIG]}. Script: "
             f"`examples/evidence/{name}.py`. Seeds: {len(found)}.", ""]  # fmt: skip
    lines += ["| claim | paper | here | test | reproduces |", "|---|---|---|---|---|"]
    for claim in shown.CLAIMS:
        said = [claim.says, claim.paper or "–", here(claim, found), claim.test, verdict(claim, found).reproduces]
        lines.append("| " + " | ".join(s.replace("|", "\\|") for s in said) + " |")
    return [*lines, ""]
