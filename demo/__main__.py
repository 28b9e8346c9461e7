"""The command line: `python -m demo`."""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from demo.model import MissingRequirement, check_installed, smollm2

PROMPTS = ("What is the capital of France? Answer in one sentence.", "Explain in one sentence what a compiler does.")
EXPORTS = {
    "unquantized": ("--target", "cpu"),
    "4-bit": ("--target", "cpu,cuda", "--qlinear", "4w"),
}
"""The exports by name, and the options in which they differ."""
ROUNDS = 3
"""How often each export answers; the speeds are medians over the rounds."""
_ROOT = Path(__file__).parent.parent
_SPEED = re.compile(r"(\d+) tokens, the first after ([\d.]+) s, then ([\d.]+) tokens per second$")
_PACKED = 1
"""The exit code of an export that another machine has to finish, and of one that failed."""


class DemoError(RuntimeError):
    """A command failed."""


@dataclass(frozen=True)
class Answer:
    """The text of an answer, the seconds until its first token, and the tokens per second after it."""

    text: str
    first: float
    speed: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 for success, 1 for a failure."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="The package on SmolLM2-135M-Instruct.")
    parser.add_argument("--model", type=Path, help="another checkpoint of a language model")
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"), help="the exports (%(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of prompt and answer (%(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="the maximum length of an answer (%(default)s)")
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--fresh", action="store_true", help="reuse no exports of an earlier run")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error("--tokens must be at least 2: the speed is that of the tokens after the first")
    try:
        check_installed()
        model = options.model or smollm2()
        folder = options.work_dir / f"{model.stem}-{_key(model, options.max_length)}"
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        for name in EXPORTS:
            _export(name, model, folder / name, options.max_length)
        _sizes(folder)
        _answers(folder, options.prompt or PROMPTS, options.tokens)
    except (DemoError, MissingRequirement, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the next run reuses the exports that are complete", file=sys.stderr)
        return 130
    return 0


def _key(model: Path, length: int) -> str:
    """Differs for other code, versions, files and lengths, whose exports are not reused."""
    digest = hashlib.sha256(f"{model.resolve()} {model.stat().st_mtime_ns} {length}".encode())
    for package in ("torch", "torchao", "executorch", "transformers"):
        digest.update(version(package).encode())
    for file in sorted((_ROOT / "et_cuda_passes").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _export(name: str, model: Path, folder: Path, length: int) -> None:
    if (folder / "export.json").is_file():
        print(f"\n{folder} is reused")
        return
    command = ["export", "--model", str(model), *EXPORTS[name], "--dtype", "bfloat16", "--max-length", str(length)]
    code, _ = _run([*command, "--output-dir", str(folder)])
    # A machine without a GPU packs the weights for cuda, and leaves the rest to another.
    if code and not (code == _PACKED and (folder / "export.json").is_file()):
        raise DemoError("the export failed")


def _run(command: Sequence[str], silent: bool = False) -> tuple[int, list[str]]:
    """Run a command of the package; return its exit code, and the lines of its standard output if it is ``silent``."""
    if not silent:
        print(f"\n$ {shlex.join(['et-cuda-passes', *command])}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "et_cuda_passes", *command],
        check=False,
        env=environment,
        text=True,
        stdout=subprocess.PIPE if silent else None,
        stderr=subprocess.PIPE if silent else None,
    )
    if silent and done.returncode:
        raise DemoError(done.stderr.strip().rpartition("\n")[2])
    return done.returncode, (done.stdout or "").splitlines()


def _sizes(folder: Path) -> None:
    print("\nSizes on disk, in MB")
    for name in EXPORTS:
        for path in sorted((folder / name).iterdir()):
            if path.suffix in (".pt2", ".pte", ".ptd"):
                print(f"  {f'{name}/{path.name}':<44} {path.stat().st_size / 1e6:8.1f}")


def _answers(folder: Path, prompts: Sequence[str], tokens: int) -> None:
    """Let the exports answer in turns, so that other load on the machine affects them equally."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for _ in range(ROUNDS):
        for prompt in prompts:
            for name in EXPORTS:
                found.setdefault((prompt, name), []).append(_answer(folder / name, prompt, tokens))
    for prompt in prompts:
        print(f"\n{prompt}")
        for name in EXPORTS:
            print(f"  {name + ':':<13} {found[prompt, name][-1].text}")
    print("\nSpeed on this CPU\n                 tokens/s    ms to the first token")
    for name in EXPORTS:
        answers = [answer for (_, each), listed in found.items() if each == name for answer in listed]
        speed, first = (
            statistics.median(values) for values in zip(*((a.speed, a.first) for a in answers), strict=True)
        )
        print(f"  {name:<13} {speed:9.1f} {1e3 * first:24.0f}")


def _answer(folder: Path, prompt: str, tokens: int) -> Answer:
    command = ["generate", str(folder), "--target", "cpu", "--trust", "--prompt", prompt]
    _, lines = _run([*command, "--max-new-tokens", str(tokens)], silent=True)
    found = _SPEED.search(lines[-1]) if lines else None
    if found is None:
        raise DemoError(f"the answer of {folder} has fewer than two tokens: {' '.join(lines)}")
    text = " ".join([*lines[:-1], lines[-1][: found.start()]]).strip()
    return Answer(text, float(found[2]), float(found[3]))


if __name__ == "__main__":
    sys.exit(main())
