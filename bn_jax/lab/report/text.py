"""Numbers as text, in ASCII, so that a terminal, a log file and a page show the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Format = Callable[[float], str]
Interval = tuple[float | None, float | None]


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


class Estimate(NamedTuple):
    """A median over runs, and its 95 % interval.

    Attributes:
      median: None where half of the runs or more have no such number.
      interval: its ends, None where one is infinite; None of a single run, whose bootstrap
        has no width and would pass for certain.
    """

    median: float | None = None
    interval: Interval | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any] | None, seeds: int) -> Estimate:
        """An estimate from `median` and `ci95` of `summary.json`."""
        value = value or {}
        low, high = value.get("ci95") or (None, None)
        ends = finite(low), finite(high)
        return cls(finite(value.get("median")), ends if seeds > 1 else None)

    def text(self, form: Format, *, open_end: str = "-", missing: str = "-") -> str:
        """Two lines, "310" and "[290, 350]"; `missing` stands for no median."""
        first = missing if self.median is None else form(self.median)
        return f"{first}\n{bracketed(self.interval, form, open_end)}".rstrip()


def bracketed(ends: Interval | list[float | None] | None, form: Format, open_end: str) -> str:
    """ "[290, 350]", with `open_end` for an end that is None; "" where both are."""
    ends = [finite(end) for end in ends or (None, None)]
    if ends == [None, None]:
        return ""
    return "[" + ", ".join(open_end if end is None else form(end) for end in ends) + "]"


def estimate(
    value: Mapping[str, Any] | None, form: Format, *, open_end: str, missing: str
) -> str:
    """`Estimate.text` of the `median` and `ci95` of `summary.json`."""
    return Estimate.of(value, 2).text(form, open_end=open_end, missing=missing)


def in_line(value: Mapping[str, Any], form: Format, seeds: int) -> str:
    """ "310 [290, ∞]"; a single run, or a missing median, has no interval."""
    found = Estimate.of(value, seeds if value["median"] is not None else 1)
    return found.text(form, open_end="∞", missing="not reached").replace("\n", " ")
