"""Matrices to numbers: singular values, directions and measures, over many adapters at once."""
