"""Site, patients and scans."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "site",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("secret_fingerprint", sa.String(64), nullable=False),
        sa.Column("train", sa.Double(), nullable=False),
        sa.Column("validation", sa.Double(), nullable=False),
        sa.Column("test", sa.Double(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_site_single_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_site")),
    )
    op.create_table(
        "patients",
        sa.Column("pseudonym", sa.String(28), nullable=False),
        sa.PrimaryKeyConstraint("pseudonym", name=op.f("pk_patients")),
    )
    op.create_table(
        "scans",
        sa.Column("scan_id", sa.String(16), nullable=False),
        sa.Column("patient", sa.String(28), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("modality", sa.String(64), nullable=True),
        sa.Column("has_truth", sa.Boolean(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["patient"], ["patients.pseudonym"], name=op.f("fk_scans_patient")),
        sa.PrimaryKeyConstraint("scan_id", name=op.f("pk_scans")),
        sa.UniqueConstraint("digest", name=op.f("uq_scans_digest")),
    )
    op.create_index(op.f("ix_scans_patient"), "scans", ["patient"])
    op.create_index(op.f("ix_scans_modality"), "scans", ["modality"])


def downgrade() -> None:
    """Drop the three tables."""
    op.drop_table("scans")
    op.drop_table("patients")
    op.drop_table("site")
