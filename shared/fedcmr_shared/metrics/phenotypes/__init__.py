"""The 82 cardiac phenotypes: their table, and what short-axis segmentations tell of them."""
