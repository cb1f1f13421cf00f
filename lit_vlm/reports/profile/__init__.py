"""Profile of a training step: summary of a profiler trace, and its page."""
