"""The cache format: records of teacher targets in ArrayRecord shards behind a manifest. docs/cache.md specifies it."""
