"""Training runs: configuration, the loop, optimiser, record, processes."""
