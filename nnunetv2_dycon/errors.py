"""Errors that a user can mend; each message is one line: the problem, its place, and the command to type."""


class UserError(ValueError):
    """Base of all errors that a user's input causes; commands print it without a traceback."""


class ConfigError(UserError):
    """A trainer name, a setting or a plan that cannot be used."""


class DataError(UserError):
    """A file or folder on disk that is missing, stale, unreadable or of the wrong kind."""


class DamagedError(DataError):
    """A file whose content is not what was written."""


class WriteError(DataError):
    """A file or folder that cannot be written: permissions, or a full disk."""


class SplitError(UserError):
    """A case in two roles, or a list of cases that does not fit the data set."""


class DivergedError(UserError):
    """A training whose loss is no longer finite."""
