"""Caches of teacher targets: building them with a teacher, importing, checking and describing them."""
