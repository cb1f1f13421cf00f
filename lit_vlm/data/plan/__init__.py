"""From an index to optimizer steps: mixture, draws, packs; the ledger of samples that turned bad, the lock of a run."""
