"""Numbers as text, in ASCII, so that a terminal, a log file and a page show the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bn_jax.lab.statistics.convergence import Estimate, Interval

Format = Callable[[float], str]


def finite(value: float | None) -> float | None:
    """`value` as a float; None where it is None, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


def number(value: float) -> str:
    """Three significant digits; whole with thousands separators from 1,000 to 10 millions."""
    rounded = f"{value:.3g}"
    if 1000 <= abs(float(rounded)) < 1e7:
        return f"{value:,.0f}"
    mantissa, e, exponent = rounded.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def padded(value: float) -> str:
    """As `number` with the zeros at the end kept, so that columns have like precision."""
    text = f"{value:#.3g}".rstrip(".")
    return number(value) if "e" in text else text


def whole(value: float) -> str:
    """Steps: no decimals, thousands separators."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A fraction in per cent with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def plural(count: int, noun: str) -> str:
    """ "1 run", "5 runs"."""
    return f"{whole(count)} {noun}" + ("" if count == 1 else "s")


def subject(summary: Mapping[str, Any]) -> str:
    """ "digits, mlp", or "digits, lstm, pixels": what the runs were about."""
    keys = ("dataset", "model", "variant")
    return ", ".join(str(summary[key]) for key in keys if summary.get(key))


def cell(estimate: Estimate, form: Format, *, open_end: str = "-", missing: str = "-") -> str:
    """Two lines, "310" and "[290, 350]"; `missing` stands for no median."""
    first = missing if estimate.median is None else form(estimate.median)
    return f"{first}\n{bracketed(estimate.interval, form, open_end)}".rstrip()


def in_line(estimate: Estimate, form: Format) -> str:
    """ "310 [290, ∞]"; a single run, or a missing median, has no interval."""
    if estimate.median is None:
        return "not reached"
    return cell(estimate, form, open_end="∞").replace("\n", " ")


def bracketed(ends: Interval | None, form: Format, open_end: str) -> str:
    """ "[290, 350]", with `open_end` for an end that is None or infinite; "" where both are."""
    known = [finite(end) for end in ends or (None, None)]
    if known == [None, None]:
        return ""
    return "[" + ", ".join(open_end if end is None else form(end) for end in known) + "]"
