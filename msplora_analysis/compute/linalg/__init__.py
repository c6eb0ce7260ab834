"""Singular values and directions of updates, from their factors."""
