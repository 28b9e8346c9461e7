"""Which tiling a weight gets: the tables are whole, the nearest entry is taken, buckets cover every number of rows."""

import itertools
import json
from pathlib import Path

import pytest

from et_cuda_passes.kernels.int4_launch import GROUP_SIZES
from et_cuda_passes.kernels.tiling import (
    DYNAMIC_ROWS,
    HOPPER,
    OTHER,
    ROWS,
    UNBOUNDED,
    Family,
    Tiling,
    Tuned,
    describe,
    family,
    load_table,
    nearest,
    tiling_for,
    tilings,
)

TILING = Tiling(16, 64, 128, 1, 0, 4, 3)
TABLE = Path(__file__).parents[2] / "et_cuda_passes" / "kernels" / "tuned"


def entry(n: int, k: int, group: int) -> Tuned:
    return Tuned(n, k, group, dict.fromkeys((*ROWS, UNBOUNDED), TILING))


def test_the_nearest_weight_is_taken_by_ratio_then_by_group() -> None:
    table = (entry(1024, 1024, 32), entry(1024, 1024, 128), entry(8192, 1024, 32))
    assert nearest(table, 2000, 1024, 32) is table[0]
    assert nearest(table, 1024, 1100, 128) is table[1]
    assert nearest(table, 4096, 1024, 64) is table[2]


def test_the_order_of_a_table_does_not_matter() -> None:
    table = (entry(1000, 1000, 32), entry(4000, 1000, 32))
    assert nearest(table, 2000, 1000, 32) is nearest(table[::-1], 2000, 1000, 32)


@pytest.mark.parametrize("gpu", [HOPPER, OTHER], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bounds", [ROWS, DYNAMIC_ROWS])
@pytest.mark.parametrize("bits", [4, 8])
def test_buckets_ascend_to_the_last(gpu: Family, group: int, bounds: tuple[int, ...], bits: int) -> None:
    for n, k in ((8192, 3072), (3072, 8192), (576, 576), (131072, 3072), (45, 128)):
        chosen = tilings(gpu, n, k, group, bounds, bits)
        assert list(chosen) == sorted(chosen) and max(chosen) == UNBOUNDED
        assert all(tiling.stages >= 2 for tiling in chosen.values())
        following = list(chosen.values())
        assert all(first != second for first, second in itertools.pairwise(following))


@pytest.mark.parametrize("gpu", [HOPPER, OTHER], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, 11008)])
def test_k_is_whole_steps_where_shorter_ones_make_it_so(gpu: Family, bits: int, group: int) -> None:
    """A step that is masked can take twice the time: 11008 is 43 steps of 256, so not four segments of those."""
    for n, k in ((2560, 9856), (896, 4864), (4096, 11008)):
        for tiling in tilings(gpu, n, k, group, bits=bits).values():
            whole = k % (tiling.block_k * tiling.segments) == 0
            assert whole or k % (64 * tiling.segments), (n, k, tiling)
            assert 2 <= tiling.stages <= 8, (n, k, tiling)


def test_lengths_beyond_the_dynamic_buckets_have_the_tiling_of_prompts() -> None:
    for n, k in ((1024, 3072), (3072, 8192)):
        assert tilings(HOPPER, n, k, 32, DYNAMIC_ROWS)[UNBOUNDED] == tiling_for(HOPPER, n, k, 32, ROWS[-1])


@pytest.mark.parametrize("rows", [1, 8, 9, 512, 513, 100_000])
def test_the_tiling_of_a_length_is_its_buckets(rows: int) -> None:
    chosen = tiling_for(HOPPER, 8192, 3072, 32, rows)
    assert chosen == next(t for bound, t in tilings(HOPPER, 8192, 3072, 32).items() if rows <= bound)


def test_only_hopper_has_wgmma() -> None:
    assert family((9, 0)) is HOPPER
    assert [family(c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))] == [OTHER] * 4
    assert not OTHER.wgmma


def test_a_description_names_every_bucket_or_the_one_of_a_known_length() -> None:
    assert describe(None, 8192, 3072, 32).startswith("M <= 8: ")
    assert "; else " in describe(None, 8192, 3072, 32)
    assert describe(1, 8192, 3072, 32) == f"M = 1: {tiling_for(HOPPER, 8192, 3072, 32, 1)}"


def _table(tmp_path: Path, **change: object) -> Path:
    table = json.loads((TABLE / "default.json").read_text())
    table["tuned"][0]["tilings"].update(change)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table))
    return path


def test_a_table_with_a_bucket_too_many_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.json: 4096 x 4096, group size 32: rows .*48.* are needed"):
        load_table(_table(tmp_path, **{"48": [16, 64, 128, 1, 0, 4, 3, 0]}))


def test_bulk_copies_of_wide_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.json: 4096 x 4096, .*bulk copies are for steps of 64 in one segment"):
        load_table(_table(tmp_path, **{"8": [16, 64, 128, 1, 0, 4, 3, 1]}))


def test_a_tiling_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.json.*a tiling is \['block_m', "):
        load_table(_table(tmp_path, **{"8": [16, 64]}))


@pytest.mark.parametrize("name", ["sm_90", "default", "sm_90_int8", "default_int8"])
def test_the_tables_are_whole(name: str) -> None:
    for tuned in load_table(TABLE / f"{name}.json"):
        for bound, tiling in tuned.tilings.items():
            where = f"{tuned.n} x {tuned.k}, rows {bound}"
            assert tiling.block_k in (64, 128, 256), where
            assert tiling.segments * tiling.block_n % (16 * tiling.warps) == 0, where
            # Cut tiles and segments are two answers to the same question; EVEN_K holds for either alone.
            assert tiling.segments == 1 or tiling.waves == 0, where
            # Bulk copies are for a GPU that has them, and for the int4 kernel.
            assert tiling.bulk in ((0, 1) if name == "sm_90" else (0,)), where
