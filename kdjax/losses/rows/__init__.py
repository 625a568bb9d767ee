"""Implementations of one pass over rows of logits: XLA, Pallas, Triton."""
