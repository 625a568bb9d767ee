"""The loss from hidden states and the unembedding, chunk by chunk, without holding the logits."""
