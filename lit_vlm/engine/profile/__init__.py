"""Where a step's time goes: a trace of some steps, summed up and shown."""
