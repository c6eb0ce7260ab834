"""Measures as functions of arrays: of a spectrum, between two spectra, between subspaces."""
