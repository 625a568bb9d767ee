"""The loss from hidden states, chunk by chunk, without holding the logits."""
