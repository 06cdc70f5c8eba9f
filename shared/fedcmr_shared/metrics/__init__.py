"""Image quality as the CardioMM protocol measures it."""
