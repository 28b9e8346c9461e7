"""The command line: `python -m demo`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

PROMPTS = ("What is the capital of France? Answer in one sentence.", "Explain in one sentence what a compiler does.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 for success, 1 for a failure."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="The package on SmolLM2-135M-Instruct.")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/demo"), help="the folder of the files (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=40, help="the maximum length of an answer, in tokens (%(default)s)"
    )
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--fresh", action="store_true", help="reuse no files of an earlier run")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error("--tokens must be at least 2: the speed is that of the tokens after the first")

    _silence_libraries()
    from demo.model import MissingRequirement, check_installed, smollm2
    from demo.story import Settings, demo

    settings = Settings(options.work_dir, options.tokens, options.prompt or PROMPTS, options.fresh)
    try:
        check_installed()
        demo(settings, smollm2(), Console(soft_wrap=True))
    except (MissingRequirement, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the next run resumes with this step", file=sys.stderr)
        return 130
    return 0


def _silence_libraries() -> None:
    """Disable the log output of libraries at import and export, which would interrupt the progress bars."""
    # This runs before the import of torchao, and after that of torch, which sets the levels of its loggers.
    import torch  # noqa: F401

    warnings.simplefilter("ignore")
    for name in ("torch", "torchao", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
