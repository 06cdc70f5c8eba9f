"""Commands of the groups `models` and `schema`."""
