"""Weights and tokenizers: read from folders, GGUF files and the hub, and written for other libraries."""
