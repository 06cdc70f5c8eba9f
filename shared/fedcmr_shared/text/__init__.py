"""Frozen text encoders and the sentences that describe a scan to them."""
