"""Hyperparameter search for DESI's broadband night-sky brightness models.

Importing this package imports neither Ray nor JAX: its rooms
(`desisky_tune.data`, `.training`, `.io`, `.search`, ...) do, when they are used.
"""

__version__ = "0.1.0"
