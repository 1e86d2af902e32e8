"""Several causal language models put together, able to generate as transformers' models are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class _Generating(PreTrainedModel, GenerationMixin):
    """What a module made of several predicts, step by step; nothing is cached between steps."""

    _supports_cache_class = False

    def __init__(self, module: Any) -> None:
        config = type(module.config)(**module.config.to_dict())
        config.use_cache = False
        super().__init__(config)
        self.module = module
        self.generation_config = GenerationConfig.from_model_config(config)
        self.generation_config.use_cache = False

    @property
    def device(self) -> Any:
        return next(self.module.parameters()).device

    def get_input_embeddings(self) -> Any:
        return self.module.get_input_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Members are tied already."""

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, attention_mask: Any = None, **rest: Any
    ) -> dict[str, Any]:
        """The whole text so far, every step: nothing is cached."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
        """Logits (batch, tokens, vocabulary)."""
        given = {"input_ids": input_ids}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        return CausalLMOutput(logits=self.module(**given).logits)


def with_generation(module: Any) -> Any:
    """A transformers model around `module`, which predicts next tokens. Left-padded batches: positions follow the mask."""
    with torch.no_grad():
        return _Generating(module).eval()
