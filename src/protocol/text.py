"""Text of unknown origin, made fit for a log line or a terminal."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 16
MAX_FRAMES = 1500
"""Characters of a traceback that another node is told."""


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with an escape in place of each character that is not one to be shown: control characters, which a
    terminal would obey, lone surrogates, which cannot be encoded, and marks that turn the direction of what follows.

    `lines`: ends of lines and tabs are kept.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        character if character.isprintable() or character in kept else character.encode("unicode_escape").decode()
        for character in text
    )


def some(items: Sequence[object]) -> str:
    """`1, 2, 3`, and of many the first ones: a sentence must not grow with the world."""
    named = ", ".join(map(str, items[:_NAMED]))
    return named if len(items) <= _NAMED else f"{named} and {len(items) - _NAMED} more"


def last_frames(traceback: str) -> str:
    """What of a traceback travels to other nodes: its end, where the error is named."""
    if len(traceback) <= MAX_FRAMES:
        return traceback
    tail = traceback[-(MAX_FRAMES - 100) :]
    cut = tail.find("\n") + 1
    tail = tail[cut if cut < len(tail) else 0 :]
    left_out = len(traceback) - len(tail)
    return f"... {left_out} characters left out, which are on the node of the rank ...\n{tail}"
