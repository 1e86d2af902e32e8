"""How mixture-of-experts models name their tensors on disk, and the dense models that they are made from."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("gate_proj", "up_proj", "down_proj")
_DENSE = re.compile(r"^(?P<block>.*\.layers\.\d+)\.mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class Layout:
    """One family's naming. router, expert and shared are templates over block, expert number `e` and part."""

    name: str  # model_type of the mixture
    dense: str  # model_type of the dense model it comes from and goes back to
    accepts: tuple[str, ...]  # dense model types whose other tensors have the same names and meaning
    architecture: str
    dense_architecture: str
    router: str
    expert: str
    parts: Mapping[str, str]  # dense part -> its name in an expert
    count: str  # config key of the number of experts
    shared: str = ""  # template of the shared expert, "" if the family has none
    shared_gate: str = ""
    on_request: tuple[str, ...] = ()  # dense model types that it takes too, where a shared expert is asked for

    def expert_name(self, block: str, e: int, part: str) -> str:
        return self.expert.format(block=block, e=e, part=self.parts[part])

    def shared_name(self, block: str, part: str) -> str:
        return self.shared.format(block=block, part=part)

    def config(self, dense: Mapping[str, Any], experts: int, top: int) -> dict[str, Any]:
        """The mixture's config.json, made from the dense model's."""
        made = {k: copy.deepcopy(v) for k, v in dense.items() if k not in ("mlp_bias", "attention_bias", "pretraining_tp")}
        made |= {"architectures": [self.architecture], "model_type": self.name, self.count: experts}
        made |= {"num_experts_per_tok": top, "output_router_logits": False, "router_aux_loss_coef": 0.001}
        if self.name != "mixtral":
            size = dense["intermediate_size"]
            made |= {"moe_intermediate_size": size, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
            made |= {"shared_expert_intermediate_size": size} if self.shared else {}
        if str(dense.get("model_type")) in self.on_request:
            made |= {"qkv_bias": False, ORIGIN: {key: copy.deepcopy(dense.get(key)) for key in ("model_type", "architectures")}}
        return made

    def dense_config(self, mixture: Mapping[str, Any]) -> dict[str, Any]:
        """The dense model's config.json, made from the mixture's."""
        gone = {
            self.count, "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "moe_intermediate_size",
            "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size",
            "router_jitter_noise", ROUTED_SCALE, ORIGIN,
        }  # fmt: skip
        made = {k: copy.deepcopy(v) for k, v in mixture.items() if k not in gone}
        made |= {"architectures": [self.dense_architecture], "model_type": self.dense}
        if ORIGIN in mixture:
            made |= copy.deepcopy(mixture[ORIGIN])
            made.pop("qkv_bias", None)
        if "moe_intermediate_size" in mixture:
            made["intermediate_size"] = mixture["moe_intermediate_size"]
        return made


ORIGIN = "upcycled_from"  # config key: the dense model's type, where that is not the layout's own
ROUTED_SCALE = "upcycled_routed_scale"  # config key: what `upcycle` multiplied the routed experts' down_proj by

_SAME = {p: p for p in PARTS}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "mixtral",
            "mistral",
            ("llama", "mistral"),
            "MixtralForCausalLM",
            "MistralForCausalLM",
            "{block}.block_sparse_moe.gate.weight",
            "{block}.block_sparse_moe.experts.{e}.{part}.weight",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            "num_local_experts",
        ),
        Layout(
            "qwen2_moe",
            "qwen2",
            ("qwen2",),
            "Qwen2MoeForCausalLM",
            "Qwen2ForCausalLM",
            "{block}.mlp.gate.weight",
            "{block}.mlp.experts.{e}.{part}.weight",
            _SAME,
            "num_experts",
            "{block}.mlp.shared_expert.{part}.weight",
            "{block}.mlp.shared_expert_gate.weight",
            ("llama", "mistral"),
        ),
        Layout(
            "qwen3_moe",
            "qwen3",
            ("qwen3",),
            "Qwen3MoeForCausalLM",
            "Qwen3ForCausalLM",
            "{block}.mlp.gate.weight",
            "{block}.mlp.experts.{e}.{part}.weight",
            _SAME,
            "num_experts",
        ),
    )
}


def dense_part(name: str) -> tuple[str, str] | None:
    """(block, part) of a dense model's feed-forward matrix: (`model.layers.3`, `up_proj`)."""
    found = _DENSE.match(name)
    return (found["block"], found["part"]) if found else None


def for_dense(model_type: str, shared: bool | None = None) -> Layout | None:
    """The layout that a dense model of this type is upcycled to. shared: with a shared expert or without; None: its own."""
    for layout in LAYOUTS.values():
        accepts = layout.accepts if shared is None else (*layout.accepts, *layout.on_request)
        if model_type in accepts and shared in (None, bool(layout.shared)):
            return layout
    return None
