"""The run folder: settings, record, checkpoints, and the processes that share it."""
