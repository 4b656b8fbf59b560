"""Numbers as they are printed, on pages and terminals."""

from __future__ import annotations

NOTHING = "–"  # noqa: RUF001
"""Where nothing was measured."""


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """A fraction in %, or a difference in points, with one digit; a dash where nothing was measured."""
    if fraction is None:
        return NOTHING
    points = round(100 * fraction, 1) + 0.0  # no minus zero
    return f"{points:+.1f}" if signed and points else f"{points:.1f}"


def seconds(spent: float | None) -> str:
    """With two digits; a dash where nothing was measured."""
    return NOTHING if spent is None else f"{spent:,.2f}"


def format_bytes(size: float | None) -> str:
    """A size in decimal units, three digits or so: 1.41 GB, 91.2 MB; a dash where nothing was measured."""
    if size is None:
        return NOTHING
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:,.{2 if size < 10 * factor else 1}f} {unit}"
    return f"{size:.0f} B"


def count(number: int, noun: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
