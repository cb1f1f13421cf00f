"""Training data made and chosen with a model."""
