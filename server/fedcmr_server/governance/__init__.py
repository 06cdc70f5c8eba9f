"""The governance service: what members ask of the coordinator beside Flower's messages."""

from fedcmr_server.governance.server import serve

__all__ = ["serve"]
