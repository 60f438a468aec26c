"""Errors that a user can mend: each names the offending item and says what to do."""

__all__ = ["TPatchError"]


class TPatchError(ValueError):
    """A mistake in what the library was given: a file, a request, a model, an option.

    The message names the offending item and the way to mend it, so the command line prints it without a traceback.

    Example:
        >>> raise TPatchError("requests.jsonl, line 3: no 'target'; add the answer that the model should give")
        Traceback (most recent call last):
        ...
        tpatch_jax.errors.TPatchError: requests.jsonl, line 3: no 'target'; add the answer that the model should give
    """
