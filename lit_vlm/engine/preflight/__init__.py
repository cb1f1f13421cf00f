"""What task=preflight finds out, and how it is shown: facts, checks, terminal, page."""
