"""Flax networks from elsewhere, cut at a feed-forward network of theirs."""
