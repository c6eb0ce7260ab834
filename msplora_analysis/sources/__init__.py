"""Where adapters are: folders, layouts of training programs, addresses; nothing of their tensors is read here."""
