"""Offline verification of exported evidence: no network, no database, no trust in the exporter."""
