"""What may not be tested on any more: the examples that earlier settings of this demo validated and tested on.

The demo's learning rates, steps and heads were settled on while tables over those examples were in sight (README.md). This
draws the earlier splits once more, and names what was in their validation and test parts, so that the present test split
can leave it out.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

TRAIN, VALIDATION, TEST = 130, 18, 34  # examples per class; groups were shared out in these proportions


def spent(examples: Sequence[Any], group_of: Callable[[Any], str], classes: int) -> set[str]:
    """Groups (texts, or modules) that were for validation or testing, when the best-stocked `classes` labels were used."""
    by_label = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    labels = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:classes]
    groups = sorted({group_of(example) for label in labels for example in by_label[label]}, key=_as_it_was)
    random.Random(0).shuffle(groups)
    return set(groups[: len(groups) * (TEST + VALIDATION) // (TRAIN + VALIDATION + TEST)])


def _as_it_was(group: str) -> str:
    """Modules were sorted as paths."""
    return group if " " in group else group.replace(".", "/") + ".py"
