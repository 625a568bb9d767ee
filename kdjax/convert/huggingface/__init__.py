"""Hugging Face checkpoints: config.json, names and layouts a family, safetensors files read and written in pieces."""
