"""Converts checkpoints to kdjax's model directories and back, strictly and one layer at a time.

`python -m kdjax.convert --help` lists the commands. A format's reader returns tensors by name, unread (tensors.py), and
a table of rules says which of them become which parameters (rules.py). `match_tensors` checks that everything fits
before the first byte is read (conversion.py), and `write_model` writes the model directory (model_writer.py).
`Export` (export.py) applies the same rules the other way.
"""
