"""Fine-tuning as an editing method."""
