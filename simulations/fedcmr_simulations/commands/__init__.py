"""Commands of the group `simulate`."""
