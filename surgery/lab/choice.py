"""Multiple choice by log-likelihood: the option that the model finds most likely after the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from surgery.lab.outcome import Labelled
from surgery.lab.scoring import check_causal, token_scores
from surgery.lab.subject import Subject
from surgery.lab.table import Table, class_of, read_table
from surgery.lab.tasks import Task

NORMALISE = ("none", "tokens", "bytes")


class Choice(Task):
    """prompt: column. choices: a column of lists, or a list of columns. answer: column with the number or the text.

    normalise: an option's log-likelihood as it is, per token, or per byte. separator: between prompt and option.
    """

    KEYS: ClassVar[Mapping[str, Any]] = {
        "prompt": str, "choices": (str, list), "answer": str, "normalise": str, "separator": str, "length": int,
    }  # fmt: skip
    OUTCOME: ClassVar[type] = Labelled
    CORRUPTED: ClassVar[str | None] = "texts"

    def validate(self) -> None:
        if self.said.get("normalise", "none") not in NORMALISE:
            raise self.refuse(f"normalise must be one of {', '.join(NORMALISE)}, got {self.said['normalise']!r}")

    def run(self, subject: Subject, split: str) -> Labelled:
        options, labels, ids, skipped = self._read(subject, split)
        scores = iter(token_scores(subject, ids, skipped, self.said.get("batch")))
        out = np.full((len(options), max(map(len, options))), -np.inf)
        kind = self.said.get("normalise", "none")
        for i, texts in enumerate(options):
            for j, text in enumerate(texts):
                found = next(scores)
                size = {"none": 1, "tokens": len(found), "bytes": len(text.encode())}[kind]
                out[i, j] = found.sum() / size
        return Labelled(out, labels)

    def right_options(self, subject: Subject, split: str) -> tuple[list[list[int]], list[int]]:
        """Prompt and right option of every row as tokens, and how many of them come before the option's own."""
        options, labels, ids, skipped = self._read(subject, split)
        starts = np.cumsum([0, *map(len, options)])[:-1] + labels
        return [ids[i] for i in starts], [skipped[i] for i in starts]

    def _read(self, subject: Subject, split: str) -> tuple[list[list[str]], Any, list[list[int]], list[int]]:
        check_causal(self, subject)
        table = self.once(("table", split), lambda: read_table(*self.place(split), self.said.get("limit")))
        options, labels = self.once(("options", split), lambda: self._options(table))
        ids, skipped = self.once(
            (split, subject.tokenizer, subject.positions), lambda: self._tokenised(subject, table, options)
        )
        return options, labels, ids, skipped

    def _options(self, table: Table) -> tuple[list[list[str]], Any]:
        said = self.said.get("choices", "choices")
        if isinstance(said, list):
            options = [list(row) for row in zip(*(table.texts(c) for c in said), strict=True)]
        else:
            options = table.column(said)
        labels = []
        for i, (texts, answer) in enumerate(zip(options, table.column(self.said.get("answer", "answer")), strict=True)):
            if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
                raise self.refuse(f"{table.name}: row {i + 1}: `choices` must be a list of at least two texts")
            found = class_of(answer, texts)
            if found is None:
                raise self.refuse(f"{table.name}: row {i + 1}: the answer {answer!r} is none of its {len(texts)} choices")
            labels.append(found)
        return options, np.array(labels)

    def _tokenised(self, subject: Subject, table: Table, options: list[list[str]]) -> tuple[list[list[int]], list[int]]:
        """Prompt and option tokenised together; what follows the prompt's own tokens is scored."""
        separator = self.said.get("separator", " ")
        longest = min(n for n in (self.said.get("length", 2048), subject.positions) if n is not None)
        tokenizer = subject.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompts = self.corrupted(table.texts(self.said.get("prompt", "prompt")))
        ids, skipped = [], []
        for i, (prompt, texts) in enumerate(zip(prompts, options, strict=True)):
            bare = prompt.rstrip()
            before = start + tokenizer(bare, add_special_tokens=False)["input_ids"]
            for text in texts:
                after = (prompt[len(bare) :] or separator) + text
                whole = start + tokenizer(bare + after, add_special_tokens=False)["input_ids"]
                skip = min(len(before), len(whole) - 1)
                if skip < 1:
                    raise self.refuse(
                        f"{table.name}: row {i + 1}: an empty prompt, and the tokenizer has no token to begin with"
                    )
                over = max(0, len(whole) - longest)
                if over >= skip:
                    raise self.refuse(f"{table.name}: row {i + 1}: an option is longer than {longest} tokens")
                ids.append(whole[over:])
                skipped.append(skip - over)
        return ids, skipped
