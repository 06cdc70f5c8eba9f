"""The coordinator's database: members, jobs, evidence, and who asked for what.

Each class below speaks about one concern; every method is one transaction.
"""

from fedcmr_server.store.access import AccessLog, Tokens
from fedcmr_server.store.database import Store, StoreUnreachable, open_store
from fedcmr_server.store.evidence import Checkpoints, Receipts, Releases
from fedcmr_server.store.jobs import Events, Jobs, Rounds
from fedcmr_server.store.members import Certificates, Members, Rosters

__all__ = [
    "AccessLog",
    "Certificates",
    "Checkpoints",
    "Events",
    "Jobs",
    "Members",
    "Receipts",
    "Releases",
    "Rosters",
    "Rounds",
    "Store",
    "StoreUnreachable",
    "Tokens",
    "open_store",
]
