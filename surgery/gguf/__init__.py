"""GGUF files, as llama.cpp has them, as checkpoints of the names and shapes that transformers uses."""
