"""The device mesh, what is split over it, what its devices exchange, and the pipeline."""
