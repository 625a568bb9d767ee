"""Hugging Face checkpoints: `families` and `config_json` describe architectures, `rules` tensors, the rest files."""
