"""One file per format: a row of a dataset becomes a `Sample` or a `PreferencePair`."""
