"""Report of task=preflight: facts, checks, terminal output and page."""
