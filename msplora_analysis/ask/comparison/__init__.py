"""Two methods compared, with intervals and in sentences."""
