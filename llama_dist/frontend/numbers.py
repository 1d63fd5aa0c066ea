"""Numbers and times for people to read."""

from __future__ import annotations

import math


def show_number(value: float) -> str:
    """Three digits or all before the point: 0.0123, 1.23, 12.3, 123, 1,234; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def show_short(value: float) -> str:
    """For narrow places: 870, 3.2k, 45k, 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.1f}{unit}" if value < 9.95 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"


def show_share(share: float) -> str:
    """0.7512 is `75 %`; what is not nothing is not shown as 0."""
    percent = 100 * share
    return (
        f"{percent:.0f} %" if percent == 0 or percent >= 0.95 else f"{percent:.1g} %" if percent >= 0.05 else "<0.1 %"
    )


def show_duration(seconds: float) -> str:
    """4.2 s, 12:34, 1:02:03, 2 d 01:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 59.95 else "1:00"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_time(seconds: float) -> str:
    """12 µs, 1.23 ms, 4.20 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{show_number(seconds / size)} {unit}"
    return f"{show_number(seconds * 1e6)} µs"
