"""What would go wrong, found before a byte is read; and the config that tells the truth about the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint import config as configs
from surgery.checkpoint.sidecar import licence
from surgery.checkpoint.source import Source
from surgery.checkpoint.ties import declared_ties, is_token_embedding, tie_flag
from surgery.checkpoint.vocabulary import compare_vocabularies, token_ids, vocabulary_rows, vocabulary_sizes
from surgery.engine.plan import Plan
from surgery.engine.quantised import check_quantised
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Read, Weighted, walk
from surgery.graph.node import Node, SourceNode, sources_of
from surgery.ops.declare import FLOAT32_MAX


def check(plan: Plan) -> None:
    """Refuse what cannot work, fill in `plan.warnings` and `plan.config`."""
    _tokenizer(plan)
    check_quantised(plan)
    _overflowing(plan)
    _vocabularies(plan)
    plan.warnings += plan.settings.vocabulary.warnings if plan.settings.vocabulary is not None else []
    plan.config = _config(plan)
    if plan.node.space == "delta":
        plan.warnings.append("the output is a delta, not a model: add it to a base to use it")
    elif plan.config is None:
        plan.warnings.append(f"{_label(plan.donor)} has no config.json: the output will have none either")
    known = {n for u in plan.uses if (n := licence(u.source))}
    if len(known) > 1:
        plan.warnings.append(f"the inputs have different licences: {', '.join(sorted(known))}")


def _label(source: Source | None) -> str:
    return "the input" if source is None else source.label


def _tokenizer(plan: Plan) -> None:
    wanted = plan.settings.tokenizer
    labels = [u.source.label for u in plan.uses]
    if wanted is not None and labels.count(wanted) > 1:
        raise Refused(f"two inputs are called `{wanted}`", hint="open(..., name=...) tells them apart")
    if wanted is not None and wanted not in labels:
        where = plan.settings.where.get("tokenizer", "output.tokenizer")
        raise Refused(f"{where}: `{wanted}` is not a model of this recipe", hint=did_you_mean(wanted, labels))


def _overflowing(plan: Plan) -> None:
    """A factor beyond the largest number of the output's type makes infinities of all that it multiplies."""
    for program in plan.programs:
        if not isinstance(program.expr, Weighted):
            continue
        largest = min(program.dtype.largest, FLOAT32_MAX)
        for coef, arg in zip(program.expr.coefs, program.expr.args, strict=True):
            if abs(coef) > largest:
                of = f"{arg.source.label} " if isinstance(arg, Read) else ""
                place = f"{plan.node.where['']}: " if plan.node.where.get("") else ""
                raise Refused(
                    f"{place}`{program.name}`: {of}multiplied by {coef:.3g} overflows {program.dtype.torch} "
                    f"(largest {largest:.3g})",
                    hint="use smaller weights, or a wider output dtype",
                )


def _vocabularies(plan: Plan) -> None:
    """Rows of embeddings that are combined must stand for the same tokens. Models that were aligned do."""
    donor = plan.donor
    if donor is None or donor.directory is None:
        return
    rows = vocabulary_rows({p.name: p.shape for p in plan.programs}, plan.node.config)
    combined: dict[int, Source] = {}
    for name in rows:
        reads = {id(e.source): e.source for e in walk([plan.by_name[name].expr]) if isinstance(e, Read)}
        if len(reads) > 1:
            combined |= reads
    aligned, vocabulary = _aligned(plan.node), plan.settings.vocabulary
    loose = [s for i, s in combined.items() if i not in aligned and s.directory is not None]
    if vocabulary is None or len(loose) == len(combined):
        loose = [s for s in loose if not _same_tokenizer(donor.directory, s.directory)]
        base: Mapping[str, int] | None = token_ids(donor.directory) if loose else None
    else:
        base = vocabulary.ids or None
    for source in loose:
        assert source.directory is not None
        mine = token_ids(source.directory)
        found = compare_vocabularies(base, mine) if base is not None and mine is not None else None
        if found is None:
            continue
        summary = f"tokenizers of {donor.label} and {source.label} differ: {found.summary()}"
        if found.moved:
            raise Refused(
                f"{summary}; their embeddings cannot be combined row by row",
                hint="align them: output: {tokenizer: union}, or the name of the model whose tokenizer to take; "
                "in Python surgery.align([...])",
            )
        plan.warnings.append(summary)


def _aligned(root: Node) -> set[int]:
    """Sources that the output reaches only by way of an alignment, by id."""
    loose: set[int] = set()
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if id(node) in seen or getattr(node, "vocabulary", None) is not None:
            continue
        seen.add(id(node))
        if isinstance(node, SourceNode):
            loose.add(id(node.source))
        stack.extend(node.inputs)
    return {id(s.source) for s in sources_of(root)} - loose


def _same_tokenizer(a: Path, b: Path | None) -> bool:
    if b is None or a == b:
        return True
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json"):
        first, second = a / name, b / name
        if first.is_file() != second.is_file():
            return False
        if first.is_file() and first.read_bytes() != second.read_bytes():
            return False
    return True


def _config(plan: Plan) -> dict[str, Any] | None:
    config = plan.node.config
    if config is None:
        return None
    bytes_by_type: Counter[str] = Counter()
    for program in plan.programs:
        if program.dtype.is_float:
            bytes_by_type[program.dtype.torch] += program.nbytes
    if bytes_by_type:
        config = configs.with_dtype(config, bytes_by_type.most_common(1)[0][0])
    config = _true_ties(plan, config)
    return _true_vocabulary(plan, config)


def _true_ties(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """A head that is written although config ties it makes the output untied."""
    if tie_flag(config) is not True or not any("embed" not in p.name and len(p.shape) == 2 for p in plan.programs):
        return config
    sizes = vocabulary_sizes(config)
    likely = [p for p in plan.programs if (sizes.intersection(p.shape) if sizes else is_token_embedding(p.name))]
    tables = {p.shape for p in likely if p.name in vocabulary_rows({p.name: p.shape}, config)}
    heads = [p for p in plan.programs if p.shape in tables and len(p.shape) == 2]
    if len(heads) < 2:
        return config
    ties = declared_ties([p.name for p in plan.programs], config)
    for alias, canonical in ties.items():
        if alias in plan.by_name and canonical in plan.by_name:
            plan.warnings.append(
                f"`{alias}` is written beside `{canonical}`: inputs mix tied and untied models; "
                "the output is untied and its config says so"
            )
            return configs.with_tied(config, False)
    return config


def _true_vocabulary(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """Config's vocabulary size follows the embedding where rows were added."""
    donor = plan.donor
    if donor is None:
        return config
    sizes = vocabulary_sizes(config)
    rows = vocabulary_rows({n: t.shape for n, t in donor.tensors.items()}, donor.config)
    grown = {
        plan.by_name[n].shape[axis]
        for n, axis in rows.items()
        if n in plan.by_name and plan.by_name[n].shape[axis] != donor.tensors[n].shape[axis]
    }
    if len(sizes) == 1 and len(grown) == 1 and not sizes & grown:
        size = grown.pop()
        plan.warnings.append(f"the vocabulary grows from {sizes.pop()} to {size} rows; does the tokenizer have the new tokens?")
        return configs.with_vocab_size(config, size)
    return config
