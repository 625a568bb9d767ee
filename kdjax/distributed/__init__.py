"""Several processes as one run: start, rendezvous, failures, watchdog, XLA flags."""
