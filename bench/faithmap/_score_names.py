"""Which names a metric's scores may have: on a board each is a column of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from faithmap.columns import BEATS, DERIVED_AFTER, IDENTITY, PLACE, column_of
from faithmap.errors import PluginError

#: What a board puts behind the column of a score: its interval and its effect size.
ENDS = re.compile(r"(_z)?(_low|_high)?$")
#: What names a line or is derived on the board; all other columns are scores of a metric.
RESERVED = frozenset({*IDENTITY, *PLACE, *DERIVED_AFTER, *BEATS.values(), "win"})


def taken(scores: Iterable[str], held: Mapping[str, Iterable[str]]) -> str:
    """Why a board has no place for scores of these names; empty where it has.

    Args:
        scores: the names.
        held: the scores of the other metrics, by the metric's name.

    >>> taken(["status"], {})
    "'status' is a column of every board"
    >>> taken(["gain", "auc_d_low"], {"perturbation": ["auc_d", "pos_auc"]})
    "'auc_d_low' is a column of the score 'auc_d' of metric 'perturbation'"
    >>> taken(["gain", "gain_high"], {})
    "'gain_high' is a column of the score 'gain', which is declared too"
    """
    columns = {score: column_of(score) for score in scores}
    for score, column in columns.items():
        plain = ENDS.sub("", column)
        if column in RESERVED or plain in RESERVED:
            return f"'{score}' is a column of every board"
        for metric, others in held.items():
            for other in others:
                if column_of(other) in (column, plain) or ENDS.sub("", column_of(other)) == column:
                    return f"'{score}' is a column of the score '{other}' of metric '{metric}'"
        if plain != column and plain in columns.values():
            return f"'{score}' is a column of the score '{plain}', which is declared too"
    return ""


def refuse_taken(metric: str, scores: Iterable[str], held: Mapping[str, Iterable[str]]) -> None:
    """Refuse a metric whose scores would meet other columns of a board.

    Raises:
        PluginError: a name is taken.
    """
    reason = taken(scores, held)
    if reason:
        raise PluginError(f"metric '{metric}': its score {reason}; give the score another name")
