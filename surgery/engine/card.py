"""The model card that goes with an output: how it was made, of what, under which licences."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.checkpoint.sidecar import licence
from surgery.checkpoint.source import Source
from surgery.engine.plan import Plan
from surgery.engine.render import amount, tree_text
from surgery.version import __version__


def model_card(plan: Plan) -> str:
    """README.md of the output: deterministic, nothing in it comes from the network."""
    sources = [u.source for u in plan.uses]
    licences = {s.label: licence(s) for s in sources}
    lines = ["---", *_front_matter(sources, licences), "---", "", "# Merged model", ""]
    lines += [f"Made with weight-surgery {__version__} from {len(sources)} checkpoints.", ""]
    lines += ["## Inputs", "", "| name | source | revision | licence | tensors used | header fingerprint (SHA-256) |"]
    lines += ["|---|---|---|---|---|---|"]
    for use in plan.uses:
        s = use.source
        used = f"{use.computed + use.passed} of {use.total}"
        shown = licences[s.label] or "not stated"
        lines.append(f"| {s.label} | `{s.location}` | {s.revision or ''} | {shown} | {used} | `{s.fingerprint}` |")
    known = {v for v in licences.values() if v}
    if len(known) > 1:
        lines += ["", f"The inputs have different licences ({', '.join(sorted(known))}): all of their terms apply."]
    lines += ["", "## Plan", "", "```", tree_text(plan), "```", ""]
    if plan.settings.recipe:
        lines += ["## Recipe", "", "```yaml", plan.settings.recipe.rstrip("\n"), "```", ""]
    lines += [f"{len(plan.programs)} tensors, {amount(plan.layout.total)}. `surgery.json` holds a digest of each.", ""]
    return "\n".join(lines)


def _front_matter(sources: Sequence[Source], licences: dict[str, str | None]) -> list[str]:
    made = ["library_name: transformers", "tags:", "- merge", "- weight-surgery"]
    named = [s.location.partition("@")[0] for s in sources if s.revision]
    if named:
        made += ["base_model:", *(f"- {n}" for n in named)]
    known = set(licences.values())
    if len(known) == 1 and None not in known:
        made.append(f"license: {known.pop()}")
    return made
