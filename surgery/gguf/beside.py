"""The config and the tokenizer that a GGUF file holds, written as transformers has them, by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from surgery.checkpoint.scratch import scratch_folder
from surgery.errors import Refused


@cache
def unpacked(path: Path, size: int, changed: int, dtype: str, shown: tuple[tuple[str, int], ...]) -> tuple[Path, str | None]:
    """(a folder with config.json and the tokenizer, what became of the tokenizer if it could not be had).

    The folder is removed when the process ends. size, changed: of the file, so that another one is read again. shown: keys
    of the config with values that the tensors show, or that transformers does not take over. Raises Refused.
    """
    folder = scratch_folder()
    with _quiet():
        _config(path, dtype, shown, folder)
        try:
            _tokenizer(path, folder)
        except Exception as problem:
            return folder, f"its tokenizer cannot be read ({_said(problem)}): put that of the original model beside the output"
    return folder, None


def _config(path: Path, dtype: str, shown: tuple[tuple[str, int], ...], folder: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as problem:
        raise Refused(f"{path}: transformers makes no config of its metadata ({_said(problem)})") from None
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is not None:
        config.architectures = [name]
    config.dtype = dtype
    for key, value in shown:
        if hasattr(config, key):
            setattr(config, key, value)
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= getattr(config, "vocab_size", pad + 1):
        config.pad_token_id = None  # the class's default, of another vocabulary
    config.save_pretrained(folder)


def _tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)


def _said(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers logs what it makes of metadata."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
