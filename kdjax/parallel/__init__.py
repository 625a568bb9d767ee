"""The device mesh, what is split over it, and the pipeline."""
