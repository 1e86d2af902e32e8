"""surgery ops [NAME]"""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.options import JSON, print_json


@click.command("ops")
@click.argument("name", required=False)
@JSON
def command(name: str | None, as_json: bool) -> None:
    """List the operators, or explain operator NAME: maths, parameters, evidence, known problems.

    \b
    Example:
      surgery ops
      surgery ops ties
    """
    from surgery import steps
    from surgery.errors import Refused, did_you_mean
    from surgery.graph.forms import forms
    from surgery.ops import registry

    if name is None:
        if as_json:
            print_json({o.name: _data(o) for o in registry.values()} | {f.name: _form_data(f) for f in forms.values()})
            return
        width = max(map(len, [*registry, *forms]))
        for op in sorted(registry.values(), key=lambda o: o.name):
            click.echo(f"{op.name:<{width}}  {op.summary}")
        click.echo("\nSteps that rebuild whole checkpoints")
        for form in sorted(forms.values(), key=lambda f: f.name):
            click.echo(f"{form.name:<{width}}  {form.summary}")
        return
    found = steps.get(name)
    if found is not None:
        print_json(_form_data(found)) if as_json else click.echo(_explain_form(found))
        return
    if name not in registry:
        raise Refused(f"there is no operator `{name}`", hint=did_you_mean(name, [*registry, *forms]))
    op = registry[name]
    print_json(_data(op)) if as_json else click.echo(explain(op))


def explain(op: Any) -> str:
    """The help page of an operator, from its declaration and docstring."""
    from surgery.ops.declare import REQUIRED, SECTIONS

    lines = [f"{op.name}: {op.summary}", "", f"takes {op.takes.text}; gives {op.gives}", ""]
    if op.params:
        lines.append("Parameters")
    for p in op.params:
        default = "required" if p.default is REQUIRED else f"default {str(p.default).lower()}"
        per = "; one for all or a list, one per input" if p.per_input else ""
        lines.append(f"  {p.name}: {p.range}, {default}{per}\n      {p.doc}")
    if any(not p.fixed for p in op.params):
        lines.append("  Numbers may also be a gradient over depth, [0.2, 0.8], or a map {glob: value}.")
    for title in filter(op.section, SECTIONS):
        lines += ["", title, *(f"  {line}" for line in op.section(title).splitlines())]
    return "\n".join(lines)


def _explain_form(form: Any) -> str:
    lines = [f"{form.name}: {form.doc}", "", f"takes {form.takes}", ""]
    lines += ["Keys"] if form.keys else []
    for key, schema in form.keys.items():
        need = "required" if key in form.required else "optional"
        lines.append(f"  {key} ({need}): {schema.get('description', '')}")
    return "\n".join(lines)


def _form_data(form: Any) -> dict[str, Any]:
    return {"summary": form.summary, "takes": form.takes, "keys": form.keys, "required": list(form.required)}


def _data(op: Any) -> dict[str, Any]:
    from surgery.ops.declare import REQUIRED

    params = [
        {
            "name": p.name,
            "accepts": p.range,
            "default": None if p.default is REQUIRED else p.default,
            "required": p.default is REQUIRED,
            "per_input": p.per_input,
            "doc": p.doc,
        }
        for p in op.params
    ]
    return {"summary": op.summary, "takes": op.takes.text, "gives": op.gives, "linear": op.linear, "params": params}
