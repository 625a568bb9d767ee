"""Files of records: paths, decompression, index, scratch directory."""
