"""Bytes for people to read."""

from __future__ import annotations


def show_bytes(n: int) -> str:
    """Decimal units, four digits at most: 1,234,567,890 is `1.23 GB`."""
    value, unit = float(n), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{n} B"
    return f"{value:.2f} {unit}" if value < 9.995 else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
