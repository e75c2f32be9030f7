"""Exceptions: one line that says what is wrong, where, and what to do about it."""


class Error(Exception):
    """Every failure of the library. Its text is one line."""


class InvalidArgumentError(Error, ValueError):
    """What was passed can never work."""


class NotFoundError(Error, LookupError):
    """A file, a name or a sequence that does not exist."""


class CorruptError(Error, ValueError):
    """A file whose content fails its checks."""


class MismatchError(Error, ValueError):
    """Two valid things that do not belong together, such as a plan and another model."""


class OutOfMemoryError(Error, MemoryError):
    """The cache's limit or the system's memory."""


class FileError(Error, OSError):
    """The operating system refused to read or write."""


class UnsupportedError(Error, NotImplementedError):
    """Valid, but not in this build, on this machine or with this version."""


class CancelledError(Error):
    """The caller asked to stop."""


class InternalError(Error, AssertionError):
    """A broken promise inside the library: please report it."""


class BudgetError(InvalidArgumentError):
    """A budget that no plan meets. `least_bytes`: of the smallest plan, for one sequence at the budget's context."""

    least_bytes: int = 0


_OF_STATUS = {
    "invalid argument": InvalidArgumentError,
    "not found": NotFoundError,
    "corrupt": CorruptError,
    "mismatch": MismatchError,
    "out of memory": OutOfMemoryError,
    "input/output": FileError,
    "unsupported": UnsupportedError,
    "cancelled": CancelledError,
    "internal": InternalError,
}


def of_status(status: str, message: str) -> Error:
    """The exception that a status of the library stands for."""
    return _OF_STATUS[status](message)
