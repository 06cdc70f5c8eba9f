"""Patient-level differential privacy: mechanism, accounting, budget rules and Merkle log."""
