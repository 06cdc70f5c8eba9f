"""Commands of the group `data`, and `models reconstruct`."""
