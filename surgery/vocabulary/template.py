"""Chat templates: those of the inputs, built-in ones, and where they are written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import read_json
from surgery.errors import Refused, did_you_mean
from surgery.graph.node import Node
from surgery.vocabulary.policy import Policy

FILE = "chat_template.jinja"
_SHORTEST = 20  # characters: anything shorter is a slip, not a template

# The published formats, one turn per message; `add_generation_prompt` opens the assistant's.
BUILT_IN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[|user|]' + m['content'] + '\\n' }}"
        "{% else %}{{ '[|' + m['role'] + '|]' + m['content'] + '[|endofturn|]\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def find_template(policy: Policy, models: Mapping[str, Node]) -> str | None:
    """The chat template that `policy` asks for; None when it asks for none. models: base first.

    `auto` is the commonest among the models that have one, of equally common ones the first model's; None if none has any.

    Raises:
        Refused: a model without a template, a file that cannot be read, a word that is none of these.
    """
    said = policy.chat_template
    if said is None:
        return None
    if not isinstance(said, str):
        raise policy.refuse(f"`chat_template` must be text, got {said!r}", key="chat_template")
    if said in models:
        found = template_of(models[said])
        if found is None:
            raise policy.refuse(f"{said} has no chat template", key="chat_template", hint="name another model, or a file")
        return found
    if said == "auto":
        counts = Counter(t for node in models.values() if (t := template_of(node)) is not None)
        return counts.most_common(1)[0][0] if counts else None
    if said in BUILT_IN:
        return BUILT_IN[said]
    if "{" in said:
        if len(said) < _SHORTEST:
            raise policy.refuse(f"`chat_template` is too short to be one: {said!r}", key="chat_template")
        return said
    path = Path(os.path.expanduser(said)) if policy.folder is None else policy.folder / Path(os.path.expanduser(said))
    if not path.is_file():
        raise policy.refuse(
            f"`chat_template: {said}` is no model, no built-in template, no Jinja and no file",
            key="chat_template",
            hint=did_you_mean(said, [*models, *BUILT_IN, "auto"]) or f"built in are {', '.join(BUILT_IN)}",
        )
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise policy.refuse(f"{path}: cannot be read: {problem}", key="chat_template") from None


def template_of(node: Node) -> str | None:
    """A model's chat template, from wherever it keeps it."""
    directory = node.donor.directory if node.donor is not None else None
    if directory is None:
        return None
    if (directory / FILE).is_file():
        return (directory / FILE).read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            said = (read_json(directory / name) or {}).get("chat_template")
        except Refused:
            continue
        if isinstance(said, list):  # several, by name
            said = next((t.get("template") for t in said if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(said, str):
            return said
    return None


def write_template(out: Path, template: str) -> None:
    """Into the file that transformers reads first, and wherever a template was before, so that all readers agree."""
    (out / FILE).write_text(template, "utf-8")
    for name, always in (("tokenizer_config.json", True), ("chat_template.json", False)):
        path = out / name
        try:
            content = read_json(path)
        except (Refused, json.JSONDecodeError):
            continue
        if content is not None and (always or "chat_template" in content):
            write_json(path, {**content, "chat_template": template})
