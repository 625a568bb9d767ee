"""Knowledge distillation of GPT students from cached top-k teacher logits, on JAX."""
