"""Analytic multi-coil phantom of the beating heart: simulated k-space with known truth."""
