"""Numbers and names as text: only the digits that carry meaning, and a unit. Knows nothing of reports."""

import math
from collections.abc import Sequence
from typing import NamedTuple

SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
MISSING = "-"  # the text of a value that a table has no number for


class KeyMetric(NamedTuple):
    """A measured value as text, with a detail that puts it in proportion, such as the original model's value."""

    label: str
    value: str
    detail: str


def significant(value: float, digits: int = 4) -> str:
    """`value` rounded to `digits` significant digits: 12.31, 0.05123, 1.235e+06."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{_decimals(value, digits)}f}"


def plus_minus(value: float, standard_error: float) -> str:
    """`value` to the second digit of its standard error: "12.31 ± 0.21".

    A standard error of zero or NaN (that of a single window) is left out.
    """
    if not math.isfinite(value) or not math.isfinite(standard_error) or standard_error <= 0:
        return significant(value)
    if abs(value) >= 1e6:
        return f"{value:.3e} ± {standard_error:.1e}"
    decimals = min(_decimals(standard_error, 2), 6)
    return f"{value:.{decimals}f} ± {standard_error:.{decimals}f}"


def percent(fraction: float) -> str:
    """A fraction of one: "91.2 %". More digits near 100 %, where the remainder matters."""
    if not math.isfinite(fraction):
        return str(fraction)
    return f"{100 * fraction:.2f} %" if 0.99 <= fraction < 1 else f"{significant(100 * fraction, 3)} %"


def relative_change(ratio: float, standard_error: float = math.nan) -> str:
    """A relative change with its sign and, if known, its standard error: "+5.42 ± 0.31 %"."""
    if not math.isfinite(ratio):
        return str(ratio)
    sign = "+" if ratio >= 0 else "-"  # a plain hyphen: every terminal has it
    if math.isfinite(standard_error) and standard_error > 0:
        return f"{sign}{plus_minus(abs(100 * ratio), 100 * standard_error)} %"
    magnitude = abs(100 * ratio)
    decimals = 2 if magnitude < 1 else 1 if magnitude < 100 else 0
    return f"{sign}{magnitude:.{decimals}f} %"


def scientific(value: float, decimals: int = 2) -> str:
    """Three digits, or another number, and the power of ten, "1.23e-3"; an exact zero is "0"."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def damping_text(value: float | None) -> str:
    """A fraction of the Hessian's mean diagonal; "-" if no damping was used."""
    return MISSING if value is None else f"{value:.3g}"


def byte_size(count: int) -> str:
    """Bytes in decimal units: "2.47 GB"."""
    size, unit = next(((size, unit) for size, unit in SIZES if count >= size), (1, "B"))
    return f"{significant(count / size, 3) if size > 1 else count} {unit}"


def duration(seconds: float) -> str:
    """ "0.42 s", "12.3 s", "3 min 20 s", "2 h 05 min"."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def plural(count: int, noun: str) -> str:
    """ "1 layer", "210 layers"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` characters, cut from the left, at a dot if possible: "…0.mlp.up_proj"."""
    if len(name) <= width:
        return name
    rest = name
    while "." in rest and len(rest) + 1 > width:
        rest = rest.split(".", 1)[1]
    return "…" + (rest if len(rest) + 1 <= width else rest[len(rest) + 1 - width :])


def listed(names: list[str], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def shortest_suffixes(keys: Sequence[str]) -> list[str]:
    """Each dotted key by its shortest unambiguous suffix: "bits", but "gptq.damping" if "rtn.damping" is a key too."""
    found = []
    for key in keys:
        parts, others = key.split("."), [f".{other}" for other in keys if other != key]
        suffixes = [".".join(parts[at:]) for at in reversed(range(len(parts)))]
        clear = [suffix for suffix in suffixes if not any(other.endswith(f".{suffix}") for other in others)]
        found.append(clear[0] if clear else key)
    return found


def _decimals(value: float, digits: int) -> int:
    if value == 0:
        return 1
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
