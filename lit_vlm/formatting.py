"""Formats of numbers and sentences in messages, tables and pages. This module imports nothing of the package."""

from __future__ import annotations


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: "1 record", "2,000 records".

    Args:
        plural: the plural of `noun`, where it is not `noun` + "s".
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def end_sentence(text: str) -> str:
    """End a text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def format_number(number: float, estimated: bool = False) -> str:
    """Format a count with thousands separators; an estimate is rounded and marked with ~."""
    if not estimated:
        return f"{number:,.0f}"
    digits = max(0, len(str(int(number))) - 3)
    return f"~{round(number, -digits):,.0f}"


def format_short(number: float | None) -> str:
    """Format a count for a table: 9,999, 12.3 k, 4.56 M, 789 G."""
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(size, 1e4):
            shown = number / size
            return f"{shown:.{0 if shown >= 100 else 1 if shown >= 10 else 2}f} {unit}"
    return f"{number:,.0f}"


def format_tick(value: float) -> str:
    """Format the number at a tick of an axis: 9,999, 12.5k, 1.5M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:.4g}k" if value >= 10_000 else f"{value:,g}"


def format_bytes(number: float) -> str:
    """Format a number of bytes with decimal units (1 GB = 10^9 bytes), as in data sheets."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{number:.0f} B"


def format_percent(share: float | None) -> str:
    """Format a share, 0 to 1, as a percentage; "" for None."""
    if share is None:
        return ""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def format_change(before: float | None, after: float | None, number_format: str = ".2f") -> str:
    """Format a change as "before \u2192 after"; an unknown value is left out."""
    known = [format(value, number_format) for value in (before, after) if value is not None]
    return " \u2192 ".join(known)


def format_duration(seconds: float | None) -> str:
    """Format a measured duration: "2 h 5 min", "3 min 10 s" or "4.2 s"."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def format_estimated_time(seconds: float) -> str:
    """Format an estimated time in one unit: days, hours, minutes or seconds."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds" if seconds >= 1 else "a second"


def format_speed(flops_per_second: float) -> str:
    """Format a speed in TFLOP/s, or in GFLOP/s below one TFLOP/s."""
    teraflops = flops_per_second / 1e12
    return f"{teraflops:.0f} TFLOP/s" if teraflops >= 1 else f"{1000 * teraflops:.0f} GFLOP/s"


def format_milliseconds(time: float) -> str:
    """Format milliseconds with about three significant digits."""
    if not time:
        return "-"
    digits = 0 if time >= 100 else 1 if time >= 10 else 2 if time >= 0.095 else 3
    return f"{time:,.{digits}f}"
