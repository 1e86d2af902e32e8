"""Where adapters start: from data (CorDA, EVA) or from the base's own matrices (PiSSA, OLoRA), by peft.

CorDA (Yang et al. 2024, arXiv 2406.05223) decomposes W C, C the covariance of a layer's inputs on calibration data: `ipm`
adapts the leading directions, `kpm` the trailing ones, so that what the calibration data need stays where it is. C is counted
here, over all tokens that are not padding; peft's own way takes one sequence at a time. EVA (Paischer et al. 2024, arXiv
2410.07170) starts A from the leading directions of the inputs and shares ranks out by them.

PiSSA, OLoRA and CorDA take their start out of the base: W = W_res + s B0 A0. What is written as an adapter is s (B A - B0 A0),
of twice the rank, so that it belongs to the base as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.errors import Refused, did_you_mean

DATA = ("corda", "eva")
MOVED = ("pissa", "olora", "corda")  # the base
OWN = ("calibration", "calibration_examples")  # keys that are not peft's
_EXAMPLES = 256
_ROUNDS = 400  # batches after which EVA has failed to settle


def kind(options: Mapping[str, Any]) -> str:
    """The word of `init_lora_weights`: pissa for pissa_niter_4."""
    said = options.get("init_lora_weights")
    return said.partition("_niter_")[0].lower() if isinstance(said, str) else ""


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """peft's keys alone, with configs of starts made of their dicts. Raises Refused for what this cannot start from."""
    made = {k: v for k, v in options.items() if k not in OWN}
    start = kind(made)
    if start in ("loftq", "lora_ga"):
        hint = "through: {codec: ..., of: base} rounds the base below an adapter" if start == "loftq" else "corda, eva or pissa"
        raise Refused(f"method.lora.init_lora_weights: {start} is not made here", hint=hint)
    if start in MOVED and made.get("use_rslora") and (made.get("rank_pattern") or made.get("alpha_pattern")):
        raise Refused(f"method.lora: {start} with use_rslora and patterns of ranks cannot be written for the base as it is",
                      hint="leave use_rslora out")  # fmt: skip
    for name in DATA:
        if name == start:
            made[f"{name}_config"] = _config(name, made.get(f"{name}_config") or {})
    return made


def _config(name: str, given: Any) -> Any:
    import inspect

    from peft.tuners.lora.config import CordaConfig, EvaConfig

    kind_of = CordaConfig if name == "corda" else EvaConfig
    if not isinstance(given, Mapping):
        return given
    takes = inspect.signature(kind_of).parameters
    for key in given:
        if key not in takes:
            raise Refused(f"method.lora.{name}_config: peft knows no `{key}`", hint=did_you_mean(key, takes))
    if name == "corda" and given.get("corda_method", "ipm") not in ("ipm", "kpm"):
        raise Refused(f"method.lora.corda_config.corda_method: ipm or kpm, not {given['corda_method']!r}")
    return kind_of(**given)


class Batches:
    """What a start is made from: the first examples of calibration data, or of those trained on."""

    def __init__(self, given: Any, settings: Any) -> None:
        from transformers import default_data_collator

        options = settings.options
        data = given.train if given.calibration is None else given.calibration
        count = min(len(data), options.get("calibration_examples", _EXAMPLES))
        collate = given.collate or default_data_collator
        self._given, self.device = given, _device(settings)
        self._batches = [
            {k: v.to(self.device) for k, v in collate([data[i] for i in range(a, min(a + settings.batch, count))]).items()}
            for a in range(0, count, settings.batch)
        ]
        self._passed = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._batches

    def run(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """A forward pass of the model, whatever the Trainer calls. peft goes on until EVA settles, which it may not."""
        self._passed += 1
        if self._passed > _ROUNDS + len(self._batches):
            size = len(next(iter(batch.values())))
            raise Refused(f"method.lora.init_lora_weights: eva has not settled after {_ROUNDS} batches of {size} examples",
                          hint="a larger batch, a smaller r or a lower tau")  # fmt: skip
        return (model if self._given.around is None else self._given.around(model))(**batch)


def prepared(model: Any, config: Any, batches: Batches) -> Any:
    """Before the adapter is made: CorDA's decomposition, left in the model's layers for peft. The config, with its targets by
    name."""
    from copy import deepcopy

    import peft
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.layer import LoraLayer

    plain = deepcopy(config)
    plain.init_lora_weights = True
    probe = peft.get_peft_model(model, plain)
    names = [n.removeprefix("base_model.model.") for n, m in probe.named_modules() if isinstance(m, LoraLayer)]
    probe.unload()
    model.to(batches.device)
    config.target_modules = set(names)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "covariance.pt"
        torch.save(_covariances(model, names, batches), file)
        own, config.corda_config.covariance_file = config.corda_config.covariance_file, str(file)
        preprocess_corda(model, config)
        config.corda_config.covariance_file = own
    return config


@torch.no_grad()
def _covariances(model: Any, names: list[str], batches: Batches) -> dict[str, Any]:
    """Mean of x x^T over a layer's inputs, in float32. Raises Refused for a layer that sees nothing."""
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    mask: Any = None

    def hook(name: str) -> Any:
        def see(module: Any, inputs: Any, output: Any) -> None:
            x = rows(inputs[0], mask).double()
            sums[name] = sums.get(name, 0.0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return see

    was = model.training
    model.eval()
    hooks = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            batches.run(model, batch)
    finally:
        for h in hooks:
            h.remove()
        model.train(was)
    for name in names:
        if name not in sums or not torch.isfinite(sums[name]).all() or not sums[name].diagonal().sum() > 0.0:
            raise Refused(f"method.lora.init_lora_weights: corda: the calibration data give `{name}` no inputs to go by")
    return {n: (s / counts[n]).float() for n, s in sums.items()}


def rows(x: Any, mask: Any) -> Any:
    """(tokens, features): what is padding left out."""
    if mask is not None and x.ndim == 3 and tuple(mask.shape) == tuple(x.shape[:2]):
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def explained(model: Any, batches: Batches) -> None:
    """After the adapter is made: EVA's start, in place. model: peft's."""
    from peft import initialize_lora_eva_weights

    model.to(batches.device)
    try:
        initialize_lora_eva_weights(
            model,
            dataloader=batches,
            forward_fn=batches.run,
            prepare_model_inputs_fn=lambda inputs, config: inputs.get("attention_mask"),
            prepare_layer_inputs_fn=lambda inputs, mask, name: rows(inputs[0] if isinstance(inputs, tuple) else inputs, mask),
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as problem:
        raise Refused(f"method.lora.init_lora_weights: eva: {(str(problem).splitlines() or [''])[0]}") from None


def _device(settings: Any) -> str:
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
