"""Command lines made from this command's own."""

from collections.abc import Mapping, Sequence


def without(arguments: Sequence[str], options: Mapping[str, int]) -> list[str]:
    """`arguments` without `options`, of which each is followed by so many values, or has its own after an `=`."""
    kept: list[str] = []
    skipped = 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skipped:
            skipped -= 1
        elif name in options:
            skipped = 0 if equals else options[name]
        else:
            kept.append(argument)
    return kept
