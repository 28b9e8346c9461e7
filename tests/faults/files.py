"""The files of a run, compared with those of a run without a fault: same input, same bytes."""

from pathlib import Path

from et_cuda_passes.unfinished import PREFIX, PREFIX_IN_TEMP

Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    """The files of a folder by name, without temporary ones."""
    if not folder.exists():
        return {}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and PREFIX not in str(path)
    }


def left_over(*folders: Path) -> list[Path]:
    """The temporary files in folders."""
    patterns = (f"{PREFIX}*", f"{PREFIX_IN_TEMP}*")
    return [path for folder in folders if folder.exists() for pattern in patterns for path in folder.rglob(pattern)]


def assert_whole(found: Contents, reference: Contents) -> None:
    """Check that each file is one of the reference, byte for byte."""
    assert {name for name, content in found.items() if reference.get(name) != content} == set()
