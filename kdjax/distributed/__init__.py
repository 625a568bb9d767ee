"""Several processes as one run: start, rendezvous, watchdog, XLA flags."""
