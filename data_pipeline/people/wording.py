"""How numbers are written for people, the same in every plot, table and sentence; a missing one is a dash."""

from __future__ import annotations

from math import floor, isfinite, log10

NONE = "—"


def count(number: int, thing: str, things: str = "") -> str:
    """`1 picture`, `1,200 pictures`, `2 entities`."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def share(part: float, whole: float) -> str:
    """`65 %`; small ones with the digits they need, and nothing is 0 % or 100 % that is not so exactly."""
    if not whole:
        return NONE
    per_cent = 100 * part / whole
    if part in (0, whole):
        return f"{per_cent:.0f} %"
    if per_cent < 0.01:
        return "< 0.01 %"
    if per_cent > 99:
        return f"{min(per_cent, 99.99):.2f} %"
    return f"{per_cent:.{0 if per_cent >= 10 else 1 if per_cent >= 1 else 2}f} %"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: `512 B`, `1.2 MB`, `35 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{number(num_bytes, 2)} {unit}"
        num_bytes /= 1000
    return f"{number(num_bytes, 2)} TB"


def number(value: float, digits: int = 3) -> str:
    """A number in so many digits that count; whole ones from there on, with commas."""
    if not isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1e15:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    if decimals > 8:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def per_cent(value: float) -> str:
    """A share in two digits: `4.8 %`."""
    return f"{number(100 * value, 2)} %" if isfinite(value) else NONE


def whole(value: float) -> str:
    return f"{value:,.0f}" if isfinite(value) else NONE


def ratio(log2_width_by_height: float) -> str:
    """An aspect as people say it: `16:9`, `1:1`, `2:3`; others to two digits, `1.2:1`."""
    value = 2.0**log2_width_by_height
    if not isfinite(value) or value <= 0:
        return NONE
    wide, long_by_short = value >= 1, max(value, 1 / value)
    for long, short in ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1), (4, 1)):
        if abs(long_by_short - long / short) < 0.01:
            return f"{long}:{short}" if wide else f"{short}:{long}"
    return f"{number(long_by_short, 2)}:1" if wide else f"1:{number(long_by_short, 2)}"
