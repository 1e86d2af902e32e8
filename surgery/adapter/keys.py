"""The dialects in which adapters name their tensors, brought to one form.

`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` is PEFT's; without the prefix, with an adapter's name between
`lora_A` and `weight`, or as `lora_down`/`lora_up`/`alpha` (kohya) it means the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from surgery.errors import Refused

_PREFIXES = ("base_model.model.", "base_model.")
_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<role>[AB])(?:\.[^.]+)?\.(?P<leaf>weight|bias)$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<role>[AB])(?:\.[^.]+)?$")
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_KOHYA = re.compile(r"^(?P<module>.+)\.lora[._](?P<role>down|up)\.weight$")
_ALPHA = re.compile(r"^(?P<module>.+)\.alpha$")
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_SAVED = re.compile(r"^(?P<module>.+)\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.(?P<leaf>.+)$")
_ORIGINAL = re.compile(r"^.+\.original_module\..+$")
_UNKNOWN = re.compile(r"\.(lora_[^.]+|dora_scale|hada_[^.]+|lokr_[^.]+|oft_[^.]+|ia3_[^.]+|vera_[^.]+)(\.|$)")
_FLAT = re.compile(r"^lora_[a-z0-9]+_(?P<rest>[^.]+)$")


@dataclass
class Target:
    """What an adapter holds for one module. Fields are names of tensors in its file.

    module: path in the model, without `base_layer`; nest: how many of those there were (stacked experts). flat: the path is in
    kohya's form, with underscores for dots.
    """

    module: str
    nest: int = 0
    embedding: bool = False
    flat: bool = False
    a: str | None = None
    b: str | None = None
    alpha: str | None = None
    magnitude: str | None = None
    bias: str | None = None

    @property
    def label(self) -> str:
        return self.module + ".base_layer" * self.nest

    @property
    def keys(self) -> list[str]:
        return [k for k in (self.a, self.b, self.alpha, self.magnitude, self.bias) if k is not None]


@dataclass
class Contents:
    """An adapter's tensors, sorted.

    full: model tensor -> key of its new value. frozen: model tensor -> key of the base's own value, which PEFT stores where
    embeddings have factors. tokens: module -> key of its new rows. ignored: keys that say nothing, with the reason.
    """

    targets: list[Target] = field(default_factory=list)
    full: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def contents(names: Iterable[str], label: str) -> Contents:
    """Sort an adapter's tensor names. Raises Refused for halves of pairs, duplicates and unknown kinds of factors."""
    made = Contents()
    targets: dict[str, Target] = {}
    for name in names:
        _place(name, _bare(name), targets, made, label)
    for target in targets.values():
        lacking = [role for role, key in (("A", target.a), ("B", target.b)) if key is None]
        if lacking:
            have = ", ".join(f"`{k}`" for k in target.keys)
            raise Refused(f"{label}: {have} has no counterpart: factor {lacking[0]} of `{target.label}` is missing")
        made.targets.append(target)
    return made


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _place(name: str, bare: str, targets: dict[str, Target], made: Contents, label: str) -> None:
    if found := _PAIR.match(bare):
        if found["leaf"] == "weight":
            _give(_target(targets, found["module"]), found["role"].lower(), name, label)
        elif found["role"] == "B":
            _give(_target(targets, found["module"]), "bias", name, label)
        else:
            raise Refused(f"{label}: `{name}`: a bias of factor A is no part of a low-rank delta")
    elif found := _EMBEDDING.match(bare):
        target = _target(targets, found["module"])
        target.embedding = True
        _give(target, found["role"].lower(), name, label)
    elif found := _MAGNITUDE.match(bare):
        _give(_target(targets, found["module"]), "magnitude", name, label)
    elif found := _KOHYA.match(bare):
        _give(_target(targets, found["module"]), "a" if found["role"] == "down" else "b", name, label)
    elif found := _TOKENS.match(bare):
        made.tokens[found["module"]] = name
    elif _ORIGINAL.match(bare):
        made.ignored[name] = "the base's own value, kept beside the trained one"
    elif (found := _ALPHA.match(bare)) and not bare.endswith(".lora.alpha"):
        _give(_target(targets, found["module"]), "alpha", name, label)
    elif found := _UNKNOWN.search(bare):
        raise Refused(f"{label}: `{name}`: factors of kind `{found[1]}` are not known; nothing was left out in silence")
    else:
        saved = _SAVED.match(bare)
        tensor = f"{saved['module']}.{saved['leaf']}" if saved else bare.replace(".base_layer.", ".")
        table = made.frozen if bare.endswith(".base_layer.weight") else made.full
        if tensor in table:
            raise Refused(f"{label}: `{name}` and `{table[tensor]}` are both the value of `{tensor}`")
        table[tensor] = name


def _target(targets: dict[str, Target], path: str) -> Target:
    module, nest = path, 0
    while module.endswith(".base_layer"):
        module, nest = module.removesuffix(".base_layer"), nest + 1
    target = targets.get(path)
    if target is None:
        flat = _FLAT.match(module)
        target = targets[path] = Target(flat["rest"] if flat else module, nest, flat=bool(flat))
    return target


def _give(target: Target, role: str, name: str, label: str) -> None:
    before = getattr(target, role)
    if before is not None:
        raise Refused(f"{label}: `{before}` and `{name}` are the same factor of `{target.label}`")
    setattr(target, role, name)
