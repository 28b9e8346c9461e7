"""Ratios in dB as JSON, which has no infinite numbers, and as text."""

import math
from collections.abc import Iterable
from typing import Any

_UNUSUAL = {math.inf: "exact", -math.inf: "no signal"}
_NOT_FINITE = "not finite"


def decibels_to_json(value: Any) -> Any:
    """``value``, or a text for a float without a JSON number.

    "exact" is infinity: there is no noise. "no signal" is minus infinity: there is noise and no signal. "not finite" is
    NaN: a value is infinite or NaN in only one of the two outputs, or all values are in both.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return _UNUSUAL.get(value, _NOT_FINITE)
    return value


def decibels_from_json(value: Any) -> Any:
    """The inverse of :func:`decibels_to_json`."""
    if value == _NOT_FINITE:
        return math.nan
    return next((number for number, text in _UNUSUAL.items() if text == value), value)


def decibels_text(value: float | None, unit: str = "") -> str:
    """A ratio with one decimal and ``unit``, or the text of :func:`decibels_to_json`; empty for None."""
    shown = decibels_to_json(value)
    return "" if shown is None else f"{shown:.1f}{unit}" if isinstance(shown, (int, float)) else str(shown)


def worst_ratio(values: Iterable[float | None]) -> float | None:
    """The lowest ratio; NaN is lower than any other. None if nothing was measured."""
    measured = [value for value in values if value is not None]
    return min(measured, key=lambda value: -math.inf if math.isnan(value) else value, default=None)
