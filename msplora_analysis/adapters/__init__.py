"""Folders to adapters: which files are adapters, of which run and step, and how one is opened."""
