"""Numbers as text, in ASCII, so that a terminal, a log file and a page show the same."""

from __future__ import annotations

import math
from collections.abc import Callable

Format = Callable[[float], str]


class Wrong(str):
    """The text of a cell that is to stand out: every form of a table marks it in its way."""


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


def subject(summary: dict) -> str:
    """ "digits, mlp", or "digits, lstm, pixels": what the runs were about."""
    keys = ("dataset", "model", "variant")
    return ", ".join(str(summary[key]) for key in keys if summary.get(key))


def target_text(summary: dict) -> str:
    """ "test accuracy 95 % (given)", or "test loss 0.3 (best of the baseline, none)"."""
    target = summary["target"]
    name, value, chosen = target["metric"].replace("_", " "), target["value"], target["chosen"]
    shown = f"{100 * value:.4g} %" if "accuracy" in name else f"{value:.4g}"
    if "baseline" in chosen and summary.get("baseline"):
        chosen = f"{chosen}, {summary['baseline']}"
    return f"{name} {shown} ({chosen})"


def plural(count: int, noun: str) -> str:
    """ "1 run", "5 runs"."""
    return f"{whole(count)} {noun}" if count == 1 else f"{whole(count)} {noun}s"


def bracketed(ci95: list | None, form: Format, open_end: str) -> str:
    """ "[290, 350]", with `open_end` for an end that is null; "" where both are."""
    ends = [finite(end) for end in ci95 or (None, None)]
    if ends == [None, None]:
        return ""
    return "[" + ", ".join(open_end if end is None else form(end) for end in ends) + "]"


def estimate(value: dict | None, form: Format, *, open_end: str, missing: str) -> str:
    """Median and interval as two lines, "310" and "[290, 350]"; `missing` for no median."""
    value = value or {}
    median = finite(value.get("median"))
    first = missing if median is None else form(median)
    second = bracketed(value.get("ci95"), form, open_end)
    return f"{first}\n{second}" if second else first


def in_line(value: dict, form: Format, seeds: int) -> str:
    """Median and interval as "310 [290, ∞]"; of one run, or without a median, no interval."""
    if seeds == 1 or value["median"] is None:
        value = value | {"ci95": None}
    return estimate(value, form, open_end="∞", missing="not reached").replace("\n", " ")
