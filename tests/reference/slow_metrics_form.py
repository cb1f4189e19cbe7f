"""Scores of a map alone once more, from their definitions: sums over pairs and over single pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence


def gini(amounts: Sequence[float]) -> float:
    """Half the mean difference of all pairs, over the mean: the index as it was first defined."""
    count = len(amounts)
    apart = sum(abs(one - other) for one in amounts for other in amounts) / count**2
    return apart / (2 * sum(amounts) / count)


def entropy(amounts: Sequence[float]) -> float:
    """Entropy of the shares in bits, over that of as many equal ones."""
    total = sum(amounts)
    bits = -sum(amount / total * math.log2(amount / total) for amount in amounts if amount > 0)
    return bits / math.log2(len(amounts))


def effective_area(amounts: Sequence[float]) -> float:
    """One over the chance that two draws by share meet in one pixel, over the number of pixels."""
    total = sum(amounts)
    meeting = sum((amount / total) ** 2 for amount in amounts)
    return 1 / meeting / len(amounts)
