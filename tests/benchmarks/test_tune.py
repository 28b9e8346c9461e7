"""The table that the tuner writes: read back as it was, other weights of the same GPU kept, every candidate legal."""

from pathlib import Path

import pytest

from benchmarks.tune import MEASURED, candidates, earlier, fastest, merged, of_weight, text
from et_cuda_passes.kernels.tiling import BULK_K, ROWS, UNBOUNDED, Tiling, Tuned, load_table


def entry(n: int, warps: int = 4) -> Tuned:
    return Tuned(n, 1024, 32, dict.fromkeys((*ROWS, UNBOUNDED), Tiling(16, 64, 128, 1, 0, warps, 3)))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "sm_00.json"
    path.write_text(text("a GPU", [entry(512), entry(64)]))
    return path


def test_a_table_is_read_as_it_was_written(table: Path) -> None:
    assert load_table(table) == (entry(64), entry(512))


def test_other_weights_of_the_same_gpu_stay(table: Path) -> None:
    measured = entry(64, warps=8)
    table.write_text(text("a GPU", merged([measured], earlier(table, "a GPU"))))
    assert load_table(table) == (measured, entry(512))


def test_what_was_measured_on_another_gpu_goes(table: Path, tmp_path: Path) -> None:
    assert earlier(table, "another GPU") == []
    assert earlier(tmp_path / "none.json", "a GPU") == []


@pytest.mark.parametrize("bound", MEASURED)
def test_every_candidate_is_a_tiling_of_its_kernel(bound: int) -> None:
    tried = candidates(bound)
    assert len(set(tried)) == len(tried)
    for tiling in tried:
        assert tiling.segments * tiling.block_n % (16 * tiling.warps) == 0, tiling
        assert tiling.segments == 1 or tiling.waves == 0, tiling
        assert not tiling.bulk or (tiling.block_k, tiling.segments) == (BULK_K, 1), tiling
    assert of_weight(bound, 4, 4096) == tried
    # The int8 kernel has no bulk copies, and neither have other GPUs.
    assert of_weight(bound, 8, 4096) == candidates(bound, 0) == of_weight(bound, 4, 4096, 0)
    assert not any(tiling.bulk for tiling in candidates(bound, 0)) and (bound < 64 or any(t.bulk for t in tried))
    # 576 is nine steps of 64, and no whole number of longer ones.
    added = [tiling for tiling in of_weight(bound, 4, 576) if tiling not in tried]
    assert all(576 % (tiling.block_k * tiling.segments) == 0 for tiling in added)
    assert added or bound in (8, 2048, UNBOUNDED)  # segments of 64 are no whole number either; or it is there already


def test_cut_tiles_have_to_be_faster_by_what_their_launch_costs() -> None:
    whole, cut = Tiling(16, 64, 128, 1, 0, 4, 3), Tiling(16, 64, 128, 1, 1, 4, 3)
    assert fastest(16, {whole: 10.0, cut: 7.0}) is whole
    assert fastest(16, {whole: 10.0, cut: 6.0}) is cut
    # With many rows the GPU is what is slow.
    assert fastest(512, {whole: 10.0, cut: 8.0}) is cut
