"""Consent and withdrawal of patients."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nobody's consent is known yet, and nobody has withdrawn."""
    op.add_column("patients", sa.Column("consent", sa.Boolean(), nullable=True))
    op.add_column(
        "patients",
        sa.Column("withdrawn", sa.Boolean(), server_default=sa.false(), nullable=False),
    )


def downgrade() -> None:
    """Forget consent and withdrawal."""
    op.drop_column("patients", "withdrawn")
    op.drop_column("patients", "consent")
