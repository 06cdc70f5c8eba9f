"""Commands of the group `coordinator`, and `models release`."""
