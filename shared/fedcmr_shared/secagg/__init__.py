"""Secure aggregation: the coordinator opens the sum over enough sites and nothing else."""
