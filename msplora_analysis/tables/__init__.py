"""The tidy tables of spectra and metrics: made, streamed, written, read."""
