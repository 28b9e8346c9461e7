"""The package's table of costs, compared with the calibration; some of its products were not fitted."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fit import Fit, held_products, load
from benchmarks.pool import geometric_mean
from et_cuda_passes.kernels.choose import costs_of
from et_cuda_passes.kernels.gpus import HOPPER

RECORDED = Path(__file__).parents[2] / "benchmarks" / "calibrations"


def fit_of(name: str, bits: int) -> Fit:
    """A calibration with the costs of the package's table, without a new fit."""
    fit, costs = Fit(load(RECORDED / name)), costs_of(HOPPER, bits)
    fit.gpu = costs.gpu
    fit.costs = {
        (tiling, group, whole): cost
        for (group, whole), tilings in costs.tilings.items()
        for tiling, cost in tilings.items()
    }
    return fit


@pytest.fixture(scope="module")
def recorded() -> Fit:
    return fit_of("sm_90.jsonl.gz", 4)


@pytest.fixture(scope="module")
def recorded_int8() -> Fit:
    return fit_of("sm_90_int8.jsonl.gz", 8)


@pytest.mark.parametrize(("kind", "least"), [("fit", 8400), ("cut", 1740), ("held", 5700)])
def test_table_predicts_nine_of_ten_points_within_15_percent(recorded: Fit, kind: str, least: int) -> None:
    points = [point for point in recorded.known(recorded.calibration.points) if point.kind == kind]
    assert len(points) >= least
    off = np.abs(np.log(recorded.predicted(points) / [point.us for point in points]))
    assert np.mean(off <= math.log(1.15)) >= 0.9
    assert np.quantile(off, 0.5) <= math.log(1.05)


def test_predicted_choice_loses_little_on_products_that_were_not_fitted(recorded: Fit) -> None:
    lost = []
    for points in held_products(recorded.calibration.points).values():
        timed = recorded.known(points)
        chosen = timed[int(np.argmin(recorded.predicted(timed)))]
        lost.append(chosen.us / min(point.us for point in timed))
    assert len(lost) == 70
    assert geometric_mean(lost) <= 1.03
    assert sum(loss > 1.15 for loss in lost) <= 2
    assert max(lost) <= 1.2


def test_int8_table_predicts_nine_of_ten_points_within_15_percent(recorded_int8: Fit) -> None:
    points = recorded_int8.known(recorded_int8.calibration.points)
    assert len(points) >= 5000
    off = np.abs(np.log(recorded_int8.predicted(points) / [point.us for point in points]))
    assert np.mean(off <= math.log(1.15)) >= 0.9
    assert np.quantile(off, 0.5) <= math.log(1.05)


def test_predicted_int8_choice_loses_little_on_products_that_were_not_fitted(recorded_int8: Fit) -> None:
    lost = []
    for points in held_products(recorded_int8.calibration.points).values():
        timed = recorded_int8.known(points)
        chosen = timed[int(np.argmin(recorded_int8.predicted(timed)))]
        lost.append(chosen.us / min(point.us for point in timed))
    assert len(lost) == 28
    assert geometric_mean(lost) <= 1.04
    assert max(lost) <= 1.2
