"""Dataset readers, one file for each format: they convert a row of a dataset to a `Sample` or a `PreferencePair`."""
