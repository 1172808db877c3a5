"""Scores of one answer, and the interval of a rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean, stdev

# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

_TRAILING = " \t\r\n.!\"'"


def exact_match(output: str, expected: str) -> bool:
    """Tells whether the output is the expected answer and nothing else.

    Args:
        output: Decoded answer, without special tokens.
        expected: The answer.

    Returns:
        True if both are equal, up to case, white space and closing punctuation.

    Example:
        >>> exact_match(" 417902133.", "417902133")
        True
        >>> exact_match("417902133 or 5", "417902133")
        False
    """
    return _normal(output) == _normal(expected)


def contains_all(output: str, expected: Sequence[str]) -> bool:
    """Tells whether every expected answer stands in the output as a word of its own.

    Args:
        output: Decoded answer, without special tokens.
        expected: The answers; at least one.

    Returns:
        True if all are found, up to case and white space.

    Raises:
        ValueError: If ``expected`` is empty.

    Example:
        >>> contains_all("it is 417902133, I think", ["417902133"])
        True
        >>> contains_all("4179021335", ["417902133"])
        False
    """
    if not expected:
        raise ValueError("expected: expected at least one answer, got none")
    text = _normal(output)
    return all(re.search(rf"(?<!\w){re.escape(_normal(e))}(?!\w)", text) for e in expected)


def share_found(output: str, expected: Sequence[str]) -> float:
    """Computes the share of the references that stand anywhere in the output.

    Source: ``string_match_all`` of RULER (arXiv 2404.06654): substrings, up to case.

    Args:
        output: Decoded answer, without special tokens.
        expected: The references; at least one.

    Returns:
        Their share, 0..1.

    Raises:
        ValueError: If ``expected`` is empty.

    Example:
        >>> share_found("It is ABC, then", ["abc", "xyz"])
        0.5
    """
    if not expected:
        raise ValueError("expected: expected at least one answer, got none")
    text = output.lower()
    return sum(answer.lower() in text for answer in expected) / len(expected)


def any_found(output: str, expected: Sequence[str]) -> float:
    """Tells whether one of the references stands anywhere in the output, as 1.0 or 0.0.

    Source: ``string_match_part`` of RULER (arXiv 2404.06654): substrings, up to case.

    Args:
        output: Decoded answer, without special tokens.
        expected: Answers of which each is right; at least one.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: If ``expected`` is empty.
    """
    return float(share_found(output, expected) > 0)


def wilson_interval(correct: float, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Computes the Wilson score interval of a rate.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.

    Args:
        correct: Number of successes; a sum of scores in 0..1 gives an interval that is too wide.
        total: Number of trials; 0 gives (0, 1).
        z: Normal quantile; the default is that of a 95% interval.

    Returns:
        Lower and upper end, both in 0..1.

    Raises:
        ValueError: If ``correct`` is not in 0..total.

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct: expected 0..{total}, got {correct}")
    if total == 0:
        return 0.0, 1.0
    rate, share = correct / total, z * z / total
    middle = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / total + share / (4 * total))
    low = middle - half if correct else 0.0
    high = middle + half if correct < total else 1.0
    return low, high


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).strip(_TRAILING)


def paired_interval(differences: Sequence[float], *, z: float = 1.959964) -> tuple[float, float]:
    """Computes an interval of the mean difference of two methods on the same samples.

    One more pair is counted on each side, +1 and -1, so a few equal pairs are no proof of equality.
    With few pairs it can cover less than it says: 91% of draws of 20 pairs, a fifth unequal.
    Source: Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data, 2012, whose interval this is for scores of 0 and 1.

    Args:
        differences: Score of one method less that of the other, each in -1..1.
        z: Normal quantile; the default is that of a 95% interval.

    Returns:
        Lower and upper end, both in -1..1.

    Example:
        >>> low, high = paired_interval([0.0] * 48 + [-1.0] * 10)
        >>> round(low, 3), round(high, 3)
        (-0.272, -0.062)
    """
    total = len(differences) + 2
    mean = sum(differences) / total
    spread = (sum(d * d for d in differences) + 2) / total - mean * mean
    half = z * math.sqrt(spread / total)
    return max(-1.0, mean - half), min(1.0, mean + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Computes the 95% interval of a mean by Student's t.

    Args:
        values: Two or more.

    Returns:
        Lower and upper end.

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    freedom, z = len(values) - 1, 1.959964
    # Beyond the table three terms of the expansion in 1 / freedom are right to 0.001.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    quantile = (
        _STUDENT[freedom - 1]
        if freedom <= len(_STUDENT)
        else z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
    )
    middle, half = fmean(values), quantile * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half
