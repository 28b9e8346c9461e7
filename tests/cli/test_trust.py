"""Files that contain more than data: each command rejects them in one line, and runs no code from them."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from et_cuda_passes.cli import app
from et_cuda_passes.cli.console import UsageError
from et_cuda_passes.cli.inputs import read_inputs
from tests.executorch import hostile
from tests.executorch.hostile import INPUTS, MakesFolder, honest, members, saved, written
from tests.processes import finished


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the output of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments], prog_name="et-cuda-passes")
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(stop.value.code or 0), out + err


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    content = members(honest(tmp_path))
    return written(tmp_path / "evil.pt2", hostile.in_sample_inputs(content, tmp_path / "marker"))


COMMANDS = (
    ("explain", "--target", "cuda"),
    ("lower", "--target", "cpu", "--stop-after", "rewrite", "--output-dir"),
    ("verify", "--target", "xnnpack"),
)


def command(name: str, path: Path, *arguments: str) -> list[str]:
    folder = [str(path.parent / "out")] if "--output-dir" in arguments else []
    return [name, str(path), *arguments, *folder]


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, rest) for name, *rest in COMMANDS], ids=lambda value: str(value)
)
def test_program_with_code_is_rejected(
    name: str, arguments: list[str], evil: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, *command(name, evil, *arguments))
    assert code == 2 and text.count("error: ") == 1
    assert f"member {INPUTS}: it looks up" in text and "--trust" in text
    assert not (evil.parent / "marker").exists() and not (evil.parent / "out").exists()


def test_program_with_code_is_read_with_trust(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(capsys, "explain", evil, "--target", "cuda", "--trust")
    assert code == 0 and (evil.parent / "marker").is_dir()


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, rest) for name, *rest in COMMANDS], ids=lambda value: str(value)
)
def test_unusual_program_is_accepted_with_trust(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "odd.pt2", {**members(honest(tmp_path)), "notes": b"mine"})
    assert run(capsys, *command(name, path, *arguments))[0] == 2
    assert run(capsys, *command(name, path, *arguments), "--trust")[0] == 0


def test_program_with_code_runs_nothing_in_a_new_process(evil: Path, tmp_path: Path) -> None:
    result = finished("explain", evil, "--target", "cpu", folder=tmp_path / "work")
    assert result.code == 2 and "it looks up posix.mkdir" in result.err
    assert not (evil.parent / "marker").exists()


def test_compiled_program_is_never_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = {"data/aotinductor/model/model.so": b"\x7fELF", "archive_format": b"pt2", "archive_version": b"0"}
    path = written(tmp_path / "compiled.pt2", library)
    for trust in ((), ("--trust",)):
        code, text = run(capsys, "explain", path, "--target", "cpu", *trust)
        assert code == 2 and "is an AOTInductor package" in text


def _header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


SAFETENSORS = {
    "a pickle": None,
    "a header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}",
    "a tensor beyond the file": _header(a={"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}) + b"1234",
    "a shape that is not its data": _header(a={"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}) + b"1234",
    "an empty file": b"",
    "a zip file": b"PK\x03\x04" + bytes(64),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors_file_is_rejected(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(SAFETENSORS[name] or saved(MakesFolder(tmp_path / "marker")))
    code, text = run(capsys, "verify", honest(tmp_path), "--target", "cpu", "--inputs", path)
    assert code == 2 and "cannot be read as safetensors" in text
    assert not (tmp_path / "marker").exists()


def test_hostile_name_in_safetensors_is_escaped(tmp_path: Path) -> None:
    save_file({"\x1b[2J": torch.zeros(1), "1": torch.zeros(1)}, tmp_path / "inputs.safetensors")
    with pytest.raises(UsageError) as error:
        read_inputs(tmp_path / "inputs.safetensors")
    assert r"holds '\x1b[2J', 1: name the inputs" in str(error.value)


@pytest.mark.parametrize("kind", ["a pickle", "a zip file", "an empty file", "zeros"])
@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_damaged_delegated_program_is_rejected(
    suffix: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    from tests.delegate.delegated import small, write

    path = write(tmp_path, {"forward": small()})
    data = {"a pickle": saved(MakesFolder(tmp_path / "marker")), "a zip file": b"PK\x03\x04", "zeros": bytes(4096)}
    path.with_suffix(suffix).write_bytes(data.get(kind, b""))
    code, text = run(capsys, "run", path, "--random-seed", "0")
    assert code == 2 and text.count("error: ") == 1 and "--trust" not in text
    assert not (tmp_path / "marker").exists()
