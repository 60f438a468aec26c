"""Fine-tuning of classifiers and question answerers, which editing needs."""
