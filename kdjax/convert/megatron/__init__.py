"""Megatron-LM's, NeMo's and Megatron-Bridge's GPT checkpoints, read without torch and without megatron.

`layout` finds out what lies in a directory or .nemo file, `distributed` and `ranks` make a `Source` of it under the
names of `names`, `arguments` reads the architecture, and `rules` says which tensors become which kdjax leaves.
"""
