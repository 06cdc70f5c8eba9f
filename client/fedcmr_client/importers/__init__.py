"""Importers: from the files of scanners and public data sets to scans of a site store.

`import_path` walks a folder and is all that most callers need. Each format is one module with an
object that follows `Importer`; `IMPORTERS` lists them in the order in which they are asked.
"""

from fedcmr_client.importers.batch import (
    IMPORTERS,
    ImportRow,
    ImportSummary,
    import_path,
)
from fedcmr_client.importers.interface import Importer, ImporterWarning, ImportOptions, Refusal

__all__ = [
    "IMPORTERS",
    "ImportOptions",
    "ImportRow",
    "ImportSummary",
    "Importer",
    "ImporterWarning",
    "Refusal",
    "import_path",
]
