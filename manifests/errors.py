"""Errors that reach the user as one line: what, where, and what to do next."""


class TeachOnceError(Exception):
    """Something the user can act on; the command line prints it without a traceback."""


class ManifestError(TeachOnceError, ValueError):
    """A job, dataset or bank document that cannot be used as it stands."""


class StorageError(TeachOnceError, OSError):
    """A path that cannot be read or written: missing, forbidden, full or broken."""


class BankError(TeachOnceError, RuntimeError):
    """A bank that refuses what is asked: another job's, locked, newer, or damaged."""
