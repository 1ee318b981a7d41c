"""Every two choices meet somewhere: far fewer cases than all combinations, the same every time."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairs_of(case: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """Every two of the (factor, number of its value) of a case."""
    return set(combinations(sorted(case.items()), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases of a value for each factor, among which any two values of two factors meet.

    Each begins with a pair that has not met, and takes of each further factor the value that meets
    most of those chosen for the first time.
    """
    numbers = {name: range(len(values)) for name, values in factors.items()}
    left = {
        pair
        for a, b in combinations(sorted(numbers), 2)
        for i in numbers[a]
        for j in numbers[b]
        for pair in pairs_of({a: i, b: j})
    }
    found = []
    while left:
        case = dict(min(left))
        for name in numbers:
            if name not in case:
                case[name] = max(
                    numbers[name],
                    key=lambda i, name=name: len(pairs_of(case | {name: i}) & left),
                )
        left -= pairs_of(case)
        found.append({name: factors[name][case[name]] for name in factors})
    return found
