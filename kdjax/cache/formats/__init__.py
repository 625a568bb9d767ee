"""Files of other programs that a cache can be imported from, or exported to. docs/cache_formats.md describes them."""
