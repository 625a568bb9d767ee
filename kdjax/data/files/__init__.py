"""Record files on disk: finding, decompressing and indexing them, and the scratch directory for the results."""
