"""Completion in a shell: words of the command line and names of targets, GPUs, schemes and rules, without torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import et_cuda_passes as ecp
from et_cuda_passes.cli.options import EXECUTABLE, TARGETS

ROOT = Path(ecp.__file__).parent.parent


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that pip writes for the entry point."""
    path = tmp_path / "et-cuda-passes"
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom et_cuda_passes.cli import main\nmain()\n"
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def completed(script: Path, line: str, shell: str = "bash") -> list[str]:
    """The words that ``script`` offers for the last word of a line, by the protocol of the shell."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script],
        env=os.environ | variables | {"_ET_CUDA_PASSES_COMPLETE": f"complete_{shell}"},
        capture_output=True,
        text=True,
    )
    imported = {each.rpartition("|")[2].strip() for each in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "torchao", "executorch", "transformers"})
    return done.stdout.split()


LINEARS = ["linear_int4", "linear_float4", "linear_int8", "linear_float8"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("do", ["doctor"]),
        ("lower --stop", ["--stop-after"]),
        ("lower model.pt2 --stop-after ", ["rewrite"]),
        ("lower model.pt2 --target ", list(TARGETS)),
        ("explain model.pt2 -t x", ["xnnpack"]),
        ("export --target cuda,", [f"cuda,{name}" for name in TARGETS[1:]]),
        ("export --target cuda,xn", ["cuda,xnnpack"]),
        ("export --qlinear 8d", ["8da4w", "8da8w", "8da4w,8da8w"]),
        ("export --qembedding ", ["4w", "8w", "4w_hqq"]),
        ("explain model.pt2 --gpu sm_1", ["sm_100", "sm_120"]),
        ("lower model.pt2 --expect linear_", [f"{name}=" for name in LINEARS]),
        ("lower model.pt2 --expect miss", ["missed="]),
        ("verify model.pt2 --target ", list(EXECUTABLE)),
        ("accuracy model.pt2 -t x", ["xnnpack"]),
        ("accuracy model.pt2 --algorithm ", ["hqq", "affine"]),
        ("match linear_", LINEARS),
    ],
)
def test_last_word_is_completed(line: str, words: list[str], script: Path) -> None:
    assert completed(script, f"et-cuda-passes {line}") == words


def test_rules_of_all_targets_are_completed(script: Path) -> None:
    names = {entry.name for target in ecp.targets() for entry in ecp.default_passes(target)}
    assert {*completed(script, "et-cuda-passes lower --expect ")} == {
        f"{name}=" for name in (*names, "rewritten", "kept", "missed")
    }


def test_fish_and_zsh_get_the_words_too(script: Path) -> None:
    assert "xnnpack" in " ".join(completed(script, "et-cuda-passes lower --target xn", "zsh"))
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ
        | {
            "_ET_CUDA_PASSES_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_ARGS": "et-cuda-passes lower --target xn",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["xnnpack"], done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script_that_is_shown(script: Path) -> None:
    program = """
    source <(_ET_CUDA_PASSES_COMPLETE=source_bash et-cuda-passes)
    complete -p et-cuda-passes
    COMP_WORDS=(et-cuda-passes lower model.pt2 --target xn) COMP_CWORD=4
    _et_cuda_passes_completion et-cuda-passes
    echo "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-c", program], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    registered, words = done.stdout.splitlines()
    assert "-F _et_cuda_passes_completion et-cuda-passes" in registered
    assert words == "xnnpack"


def test_help_names_the_options_of_completion(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert "--install-completion" in done.stdout and "--show-completion" in done.stdout
