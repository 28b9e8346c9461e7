"""--stream, --cache and --compile-spec of the command line."""

from pathlib import Path

import pytest

from tests.cli.command import Run, names
from tests.saved import save


def rewrite(command: Run, path: Path, out: Path, *options: object) -> str:
    result = command("lower", path, "-t", "cpu", "--stop-after", "rewrite", "-o", out, *options)
    assert result.code == 0, result.err
    return result.out


def test_second_command_takes_packed_weights_from_the_cache(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    cache = tmp_path / "cache"
    assert f"packed 4 constants, 0 from the cache {cache}" in rewrite(command, path, tmp_path, "--cache", cache)
    assert f"packed 0 constants, 4 from the cache {cache}" in rewrite(command, path, tmp_path, "--cache", cache)
    assert len(names(cache)) == 4


def test_cache_is_read_from_the_environment(tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = save(tmp_path, "4w")
    monkeypatch.setenv("ETCP_CACHE", str(tmp_path / "cache"))
    assert "packed 4 constants" in rewrite(command, path, tmp_path, "--cache-limit", "1")


def test_streamed_program_is_the_same_file(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    folders = [tmp_path / "one", tmp_path / "two"]
    rewrite(command, path, folders[0])
    rewrite(command, path, folders[1], "--stream", tmp_path / "stream")
    one, two = ((folder / "model.cpu.packed.pt2").read_bytes() for folder in folders)
    assert one == two and names(tmp_path / "stream") == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--cache-limit", "2"], "--cache-limit limits the folder of --cache: give that too"),
        (["--cache", "nothing://x"], "--cache: the cache nothing://x"),
        (["--stream", __file__], f"--stream {__file__} cannot be created: {__file__} is a file; name a directory"),
        (["--compile-spec", "max_autotune=ON"], "--compile-spec is an option of cuda, and the target is cpu"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, command: Run, options: list[str], problem: str) -> None:
    path, _ = save(tmp_path, "4w")
    result = command("lower", path, "-t", "cpu", "-o", tmp_path, *options)
    assert result.code == 2 and problem in result.error


def test_wrong_compile_spec_is_refused(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    result = command("lower", path, "-t", "cuda", "-o", tmp_path, "--compile-spec", "low_memory=ON")
    assert result.code == 2 and "--compile-spec: the CUDA backend has no compile spec 'low_memory'" in result.error
    options = ["--stop-after", "rewrite", "--compile-spec", "low_memory_mode=ON"]
    result = command("lower", path, "-t", "cuda", "-o", tmp_path, *options)
    assert result.code == 2 and "--compile-spec is an option of the lowering, which --stop-after" in result.error
