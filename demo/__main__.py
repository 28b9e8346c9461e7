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
    """Run the demo as the command line asks; 0 done, 1 failed."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="The main job on SmolLM2-135M-Instruct.")
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"), help="where the files go (%(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="the longest answer, in tokens (%(default)s)")
    parser.add_argument("--prompt", action="append", help="what to ask; may be given several times")
    parser.add_argument("--fresh", action="store_true", help="use no file of an earlier run")
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
        print("\ndemo: interrupted; the next run goes on with the step that this one was at", file=sys.stderr)
        return 130
    return 0


def _silence_libraries() -> None:
    """What they say at import and export is about themselves, and would cut through the bars."""
    # Before torchao is imported, and after torch, which sets its own loggers' levels.
    import torch  # noqa: F401

    warnings.simplefilter("ignore")
    for name in ("torch", "torchao", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
