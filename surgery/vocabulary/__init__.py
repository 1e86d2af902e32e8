"""Vocabularies: models whose tokenizers differ, aligned token by token before they are merged."""

from __future__ import annotations

from surgery.vocabulary.align import Aligned, align
from surgery.vocabulary.node import AlignedNode
from surgery.vocabulary.policy import Policy, TokenRule
from surgery.vocabulary.tokenizer import OutputTokenizer

__all__ = ["Aligned", "AlignedNode", "OutputTokenizer", "Policy", "TokenRule", "align"]
