"""What all parties of a federation agree on: schemas, k-space operators, models, metrics.

This package decides and computes. It never opens a network connection or a database.
"""

__version__ = "0.1.0"
