"""`python -m kdjax.plan`: memory, communication and step time of a run on GPUs that are not here."""
