"""`kdjax plan`: memory, communication and step time of a run on GPUs that need not be present."""
