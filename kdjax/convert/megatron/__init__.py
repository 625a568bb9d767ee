"""GPT checkpoints of Megatron-LM, NeMo and Megatron-Bridge, read and written without torch and without megatron.

`checkpoint` finds out which format a directory or .nemo file holds. `dcp_reader` and `rank_reader` read its tensors,
`parameter_names` brings their names to Megatron-Core's, and `rules` says which kdjax parameters they become.
`args_reader` reads the architecture. `dcp_writer` and `args_writer` write what Megatron-Core loads.
"""
