"""Measures what a trained adapter is worth to its task: moments, and ablations. It needs the model and the data."""
