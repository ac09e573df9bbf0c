"""Errors that are a user's to mend: one sentence each, naming the flag or file, printed without a traceback."""


class UserError(ValueError):
    """What a user did or has that can't work, in one sentence."""


class UsageError(UserError):
    """A combination of arguments that can't work."""


class ModelError(UserError):
    """A model that can't be used."""


class DataError(UserError):
    """Data that can't be used."""

    def __init__(self, message):
        # From a DataLoader worker the error is rebuilt with a traceback as its text; the sentence comes last.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class UnreachableDataError(DataError):
    """Data that lie elsewhere and can't be read now: the run stops, where a broken sample is left out."""


class CheckpointError(UserError):
    """A folder that can't be started in or resumed from."""


def first_line(error):
    """The first line of what an exception says, cut to a sentence's length, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
