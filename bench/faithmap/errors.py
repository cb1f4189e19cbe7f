"""The exceptions of faithmap: one root, so that a caller can catch everything of ours at once.

Every message says what was given, what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FaithmapError(Exception):
    """Root of all errors that faithmap raises on purpose."""


class RequestError(FaithmapError, ValueError):
    """The request itself is wrong: an unknown name, a bad value, a file that is not there.

    The command line turns it into one sentence and exit code 2.
    """


class PluginError(FaithmapError):
    """A plugin broke its contract: a wrong shape, a missing fact, a duplicate name."""


class DataError(FaithmapError):
    """One image, mask or box could not be read; the other images are not concerned."""


def nearest(given: str, known: Iterable[str]) -> str:
    """Name the known words nearest to a misspelt one, or list some of them.

    >>> nearest("gradcan", ["gradcam", "rise"])
    "did you mean 'gradcam'?"
    >>> nearest("zzz", ["gradcam", "rise"])
    'known are: gradcam, rise'
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    shown = ", ".join(names[:20])
    return f"known are: {shown}" + (", ..." if len(names) > 20 else "") if names else "none are known"
