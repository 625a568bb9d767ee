"""Checkpoints in and out: tables of rules, one strict applier, and a writer that holds a layer at a time.

`python -m kdjax.convert --help` lists the commands. A format's reader makes a `Source` (tensors.py: names to tensors
that are read when asked), a table of `Rule`s (rules.py) says which of them become which kdjax leaves, `plan` checks
that everything fits before the first byte is read, and `write_model` (output.py) writes the model directory.
"""
