"""The commands of ``msplora-measure``, one file each."""
