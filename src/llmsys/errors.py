"""Exceptions whose type tells the runner what to write into the record; everything else is classified by `runner`."""


class Refused(ValueError):
    """A check said no before anything was loaded: too little memory or time here. Recorded as `skipped`, not final.

    `reason` is one word for the record: `memory` or `time`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Contradiction(ValueError):
    """Settings that are right one by one and cannot go together, or not on this machine. Within a sweep that is one
    combination's matter, which is recorded as `unsupported`, and the others run."""


class MissingPackage(LookupError):
    """A package that this run needs is not installed; the message names the extra that brings it."""


class NotANumber(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the message names the step."""


class Interrupted(Exception):
    """The run was asked to stop (SIGINT, SIGTERM) and did, between two steps; the message says what was kept."""
