"""The commands of ``msplora-analyze`` that have a module of their own."""
