"""The errors that a user can meet, as one small tree.

::

    FedcmrError            shown as one line; the command ends with exit code 1
    ├── ConfigurationError a setting, job or option is wrong
    ├── DataError          a file, scan or store is wrong
    │   └── AlreadyImported   the store holds these samples already
    ├── ModelError         a model, bundle or text encoder is wrong
    └── FederationError    a run, round or message is wrong

Each message names the file, field or setting and says what to do about it.
"""


class FedcmrError(Exception):
    """Root of all errors that are meant for the user."""


class ConfigurationError(FedcmrError):
    """A setting, job or option cannot be used."""


class DataError(FedcmrError):
    """A file, scan or store cannot be used."""


class AlreadyImported(DataError):
    """The store already holds a scan with the same samples."""


class ModelError(FedcmrError):
    """A model, bundle or text encoder cannot be used."""


class FederationError(FedcmrError):
    """A run, round or message cannot be used."""
