"""Networks, one file each, their registry and the bundles that carry their weights."""
