"""Fresh databases."""

from databases import create_database, new_database, postgresql

__all__ = ["create_database", "new_database", "postgresql"]
