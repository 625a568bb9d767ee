"""The train step and what surrounds it: state, optimiser, metrics, the run directory."""
