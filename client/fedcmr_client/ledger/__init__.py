"""The site's privacy ledger: one append-only signed log, and the jobs that it lets run."""

from fedcmr_client.ledger.checkpoints import CheckpointSchedule
from fedcmr_client.ledger.ledger import Ledger
from fedcmr_client.ledger.place import LedgerPlace
from fedcmr_client.ledger.spending import JobSpending, Spending

__all__ = ["CheckpointSchedule", "JobSpending", "Ledger", "LedgerPlace", "Spending"]
