"""Every step that recipes know beside the operators of `surgery.ops`: `surgery.steps.layers(checkpoint, keep=["0:8"])`.

A room with steps of its own adds its module here.
"""

from typing import Any

from surgery.adapter import forms as _adapter  # noqa: F401
from surgery.graph import edit_forms, reset_forms, stack_forms  # noqa: F401
from surgery.graph.forms import Form, forms
from surgery.reshape import forms as _reshape  # noqa: F401
from surgery.reshape import smooth_forms as _smooth  # noqa: F401


def get(name: str) -> Form | None:
    """The form called `name` in recipes, or None."""
    return forms.get(name)


def __getattr__(name: str) -> Any:
    try:
        return forms[name]
    except KeyError:
        raise AttributeError(f"surgery.steps has no step {name!r}") from None
