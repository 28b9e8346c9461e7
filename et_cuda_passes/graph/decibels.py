"""Ratios in dB as JSON, which has no infinite numbers."""

import math
from typing import Any

_UNUSUAL = {math.inf: "exact", -math.inf: "no signal"}
_NOT_FINITE = "not finite"


def decibels_to_json(value: Any) -> Any:
    """``value``, or a text for a float without a JSON number.

    "exact" is infinity: there is no noise. "no signal" is minus infinity: there is noise and no signal. "not finite" is
    NaN: a value is infinite or NaN in only one of the two outputs.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return _UNUSUAL.get(value, _NOT_FINITE)
    return value


def decibels_from_json(value: Any) -> Any:
    """The inverse of :func:`decibels_to_json`."""
    if value == _NOT_FINITE:
        return math.nan
    return next((number for number, text in _UNUSUAL.items() if text == value), value)
