"""Deltas in the formats of other tools: slime's disk deltas, vLLM's checkpoint patches, PEFT's LoRA, BitDelta's diffs."""
