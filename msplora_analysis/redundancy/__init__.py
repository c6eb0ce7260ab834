"""What layers, and scales of one layer, have in common: the tables of pairs."""
