"""Architectures of transformers: no weight is missed, no step fails, and every target computes the generic numbers."""

import pytest

from tests.zoo.models import MODELS, Model
from tests.zoo.record import record

# Rounding of one operator, in float32. The operators of the bfloat16 targets decompose to what the generic program has.
TOLERANCE = 1e-5
# transformers itself does not export these.
REFUSED: frozenset[str] = frozenset()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.model_type)
def test_every_weight_is_rewritten_or_kept_and_the_numbers_stay(model: Model) -> None:
    rows = record(model)
    if model.model_type in REFUSED:
        assert all(row["error"].startswith("transformers") for row in rows)
        pytest.skip(rows[0]["error"])
    assert [row["error"] for row in rows if row["error"]] == []
    assert [row["reasons"] for row in rows if row["missed"]] == []
    assert sum(row["linears"] for row in rows) > 0
    assert max(row["difference"] for row in rows) < TOLERANCE
