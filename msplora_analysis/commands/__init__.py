"""The commands of ``msplora-analyze``, one module each, with ``register(app)``."""
