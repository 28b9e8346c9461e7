"""The cache of packed constants: the same program without packing, damaged entries, limits, URLs, other writers."""

import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes import PackedCache
from et_cuda_passes.executorch.packed import save_packed
from et_cuda_passes.layouts import LAYOUTS, cpu, embedding_table
from et_cuda_passes.packed_cache import PACKER_VERSION, content_key
from et_cuda_passes.rewrite import constant_pool
from et_cuda_passes.testing import Quantized, export, floats
from tests.processes import process

CONSTANTS = (
    "layers.0.data.packed",
    "layers.0.data.scale_and_zero",
    "layers.1.data.packed",
    "layers.1.data.scale_and_zero",
)


_NOBODY = 65534


def program(seed: int = 0) -> ExportedProgram:
    """Two 4-bit linears."""
    return export(nn.Sequential(*(Quantized(64, 64, seed=seed + n) for n in range(2))), floats(2, 64))


def constants(rewritten: ExportedProgram) -> dict[str, list[int]]:
    return {
        name: tensor.detach().view(-1).view(torch.uint8).tolist()
        for name, tensor in rewritten.state_dict.items()
        if "packed" in name or "scale_and_zero" in name
    }


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


def counts(report: ecp.Report, place: object) -> list[str]:
    return [note.replace(f" the cache {place}", "") for note in report.notes if "cache" in note]


def test_second_rewrite_packs_nothing_and_has_the_same_bytes(tmp_path: Path) -> None:
    plain, without = ecp.rewrite(program(), "cuda", gpu="sm_90")
    first, packed = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=tmp_path)
    second, loaded = ecp.rewrite(program(), "cuda", gpu="sm_80", cache=tmp_path)
    assert counts(without, "") == []
    assert counts(packed, tmp_path) == ["packed 4 constants, 0 from"]
    assert counts(loaded, tmp_path) == ["packed 0 constants, 4 from"]
    assert constants(plain) == constants(first) == constants(second) and len(constants(plain)) == 4
    assert len(entries(tmp_path)) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
def test_entries_of_other_weights_and_targets_are_not_used(tmp_path: Path, target: str) -> None:
    ecp.rewrite(program(), "cuda", gpu="sm_90", cache=tmp_path)
    found, report = ecp.rewrite(program(seed=7), target, cache=tmp_path)
    assert counts(report, tmp_path) == ["packed 4 constants, 0 from"]
    assert constants(found) == constants(ecp.rewrite(program(seed=7), target)[0])


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip_last_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"0" * 5000),
    "header of another type": lambda path: path.write_bytes(b"[1]\n" + path.read_bytes().partition(b"\n")[2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_packed_again_and_replaced(tmp_path: Path, damage: str) -> None:
    first, _ = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=tmp_path)
    before = [path.read_bytes() for path in entries(tmp_path)]
    DAMAGE[damage](entries(tmp_path)[0])
    cache = PackedCache(tmp_path)
    second, report = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=cache)
    assert counts(report, tmp_path) == ["packed 1 constants, 3 from; 1 damaged entry was replaced"]
    assert constants(first) == constants(second)
    assert [path.read_bytes() for path in entries(tmp_path)] == before


def test_least_recently_used_entries_are_removed_beyond_the_limit(tmp_path: Path) -> None:
    ecp.rewrite(program(), "cuda", gpu="sm_90", cache=tmp_path)
    old = entries(tmp_path)
    for age, path in enumerate(old):
        os.utime(path, (age, age))
    size = sum(path.stat().st_size for path in old)
    # A use makes an entry young.
    plans = constant_pool(cache=tmp_path)
    assert plans.storage is not None
    content = old[0].read_bytes()
    reader = PackedCache(tmp_path)
    assert reader._store.read(old[0].name.removesuffix(".packed")) == content
    ecp.rewrite(program(seed=5), "cuda", gpu="sm_90", cache=PackedCache(tmp_path, limit=1.5 * size))
    left = [path for path in old if path.exists()]
    assert old[0] in left and old[1] not in left
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 1.5 * size


def test_limit_removes_no_entry_of_the_same_run(tmp_path: Path) -> None:
    _, report = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=PackedCache(tmp_path, limit=1))
    assert counts(report, tmp_path) == ["packed 4 constants, 0 from"] and len(entries(tmp_path)) == 4
    ecp.rewrite(program(seed=3), "cuda", gpu="sm_90", cache=PackedCache(tmp_path, limit=1))
    assert len(entries(tmp_path)) == 4


def test_part_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    dead, living = tmp_path / ".unfinished-a", tmp_path / ".unfinished-b"
    dead.write_bytes(b"half")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        PackedCache(tmp_path)
        assert not dead.exists() and living.exists()


def write(folder: Path) -> None:
    for seed in range(4):
        ecp.rewrite(program(seed), "cuda", gpu="sm_90", cache=folder)


def test_two_processes_write_the_same_entries(tmp_path: Path) -> None:
    writers = [process(write, tmp_path) for _ in range(2)]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob(".unfinished-*"))
    for seed in range(4):
        _, report = ecp.rewrite(program(seed), "cuda", gpu="sm_90", cache=tmp_path)
        assert counts(report, tmp_path) == ["packed 0 constants, 4 from"]


def test_url_of_fsspec_is_a_cache() -> None:
    url = "memory://packed/constants"
    first, _ = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=url)
    second, report = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=url)
    assert counts(report, url) == ["packed 0 constants, 4 from"] and constants(first) == constants(second)
    system = fsspec.filesystem("memory")
    assert len(system.ls("/packed/constants")) == 4
    system.rm("/packed", recursive=True)


def test_file_url_is_a_folder(tmp_path: Path) -> None:
    ecp.rewrite(program(), "cuda", gpu="sm_90", cache=f"file://{tmp_path}/made")
    assert len(entries(tmp_path / "made")) == 4


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the cache memory://x has a limit, .* give the bucket a rule"):
        PackedCache("memory://x", limit=1e9)
    with pytest.raises(ValueError, match=r"the cache nothing://x: .*; give a folder, or a URL with"):
        PackedCache("nothing://x")
    for place in ("s3:bucket/folder", "memory:x"):
        protocol, _, rest = place.partition(":")
        with pytest.raises(ValueError, match=rf"lacks two slashes: write {protocol}://{rest}, or \./{place}"):
            PackedCache(place)
    with pytest.raises(ValueError, match="has an empty name: give a folder"):
        PackedCache("")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file is a file; name another folder"):
        PackedCache(tmp_path / "file")
    with pytest.raises(
        OSError, match="closed cannot be opened .*ConnectionRefusedError.*: check its name, the network"
    ):
        PackedCache("ftp://127.0.0.1:9/closed")
    with pytest.raises(ValueError, match="must be at least 1 byte, got 0"):
        PackedCache(tmp_path, limit=0)
    with pytest.raises(ValueError, match="belong to the pool"):
        ecp.rewrite(program(), "cuda", pool=constant_pool(), cache=tmp_path)


@pytest.mark.skipif("s3fs" in sys.modules, reason="s3fs is installed")
def test_protocol_without_its_package_names_the_package() -> None:
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"the cache s3://bucket: .*s3fs"):
            PackedCache("s3://bucket")


def test_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PackedCache("./s3:bucket")
    PackedCache("day:one")
    assert {path.name for path in tmp_path.iterdir()} == {"s3:bucket", "day:one"}


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_two_users_share_a_folder() -> None:
    """The second can read the entries of the first, and neither change nor remove them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        first, _ = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=folder)
        before = {path: path.read_bytes() for path in entries(folder)}
        os.seteuid(_NOBODY)
        try:
            second, report = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=PackedCache(folder))
            # These go beyond the limit.
            ecp.rewrite(program(seed=5), "cuda", gpu="sm_90", cache=PackedCache(folder, limit=1))
        finally:
            os.seteuid(0)
        assert counts(report, folder) == ["packed 0 constants, 4 from"] and constants(first) == constants(second)
        assert {path: path.read_bytes() for path in before} == before and len(entries(folder)) == 8
        for path in before:
            path.chmod(0)
        os.seteuid(_NOBODY)
        try:
            with pytest.raises(OSError, match="of the cache cannot be read: Permission denied; let its users read the"):
                ecp.rewrite(program(), "cuda", gpu="sm_90", cache=folder)
        finally:
            os.seteuid(0)


def test_packed_program_is_the_same_with_any_cache(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("without.pt2", "first.pt2", "second.pt2")]
    for path in paths:
        cache = None if path is paths[0] else tmp_path / "cache"
        rewritten, report = ecp.rewrite(program(), "cuda", gpu="sm_90", cache=cache)
        save_packed(rewritten, report, path)
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()


def test_host_specific_layout_has_keys_of_its_instruction_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ecp.rewrite(program(), "cpu", cache=tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    _, report = ecp.rewrite(program(), "cpu", cache=tmp_path)
    assert counts(report, tmp_path) == ["packed 2 constants, 2 from"]


def test_key_depends_on_bytes_shape_and_form(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Keys(PackedCache):
        def load(self, plan: Any, out: torch.Tensor) -> bool:
            seen.append(content_key(plan))
            return super().load(plan, out)

    for each in (program(), program(), program(seed=9)):
        ecp.rewrite(each, "cuda", gpu="sm_90", cache=Keys(tmp_path))
    assert seen[:4] == seen[4:8] and not set(seen[:4]) & set(seen[8:]) and len(set(seen)) == 8


def packed_bytes() -> dict[str, str]:
    """Hashes of what each layout makes of one weight. That of cpu depends on the host and is left out."""
    q = (torch.arange(64 * 256) * 40503 // 7 % 16).to(torch.uint8).view(64, 256)
    scale = (torch.arange(64 * 8) % 13 + 1).float().view(64, 8) / 8
    zero = (torch.arange(64 * 8) % 5 - 2).float().view(64, 8) / 4
    found = {}
    for name, layout in LAYOUTS.items():
        if layout is not cpu.LAYOUT:
            found[name] = layout.pack(q, 0, 72)
        found[f"{name}, scales"] = layout.pack_scales(scale, zero, torch.bfloat16, 256)
        found[f"{name}, scales without zeros"] = layout.pack_scales(scale, None, torch.float32, 256)
    for bits in embedding_table.BITS:
        found[f"embedding_table, {bits} bits"] = embedding_table.pack(q.to(torch.int16) % (1 << bits), bits)
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in found.items()
    }


@pytest.mark.golden
def test_bytes_of_layouts_change_with_the_packer_version_only(request: pytest.FixtureRequest) -> None:
    path = Path(__file__).parent / "golden" / "packed.json"
    found = {"version": PACKER_VERSION, "sha256": packed_bytes()}
    if request.config.getoption("--update-golden"):
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else found
        # A layout that is new has no entries in any cache.
        same = found["version"] == known["version"] and found["sha256"].items() >= known["sha256"].items()
        assert same or found["version"] > known["version"], "raise PACKER_VERSION first"
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    known = json.loads(path.read_text(encoding="utf-8"))
    assert found == known, "other bytes: raise PACKER_VERSION, unless a layout is new, and then run `make golden`"
