"""Training plan: mixture sampling, optimizer steps, packing into micro-batches, quarantine ledger, mixture lock file."""
