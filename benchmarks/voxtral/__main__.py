"""Voxtral Mini 3B's dimensions with random weights, lowered by ExecuTorch's CUDA backend and measured, by variant.

    python -m benchmarks.voxtral --jobs 4                     # lower and measure; a second call resumes
    python -m benchmarks.voxtral --scale tiny                 # all steps in a minute or two
    python -m benchmarks.voxtral --table                      # only the tables, from existing results

Each variant is one .pte with one .ptd and the methods audio_encoder, token_embedding and text_decoder. torchao
quantizes the linears to int4 in groups of 32; embeddings and convolutions stay bf16. Each step is a separate process:
lowering a variant (weights, export and lowering in one, since writing and reading a program of 9 GB takes longer than
its export), computing the reference in eager, measuring a variant. A successful step is not repeated. Lowering and
measuring need a CUDA device.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.voxtral.dimensions import SCALES, Dimensions
from benchmarks.voxtral.steps import Results, Runner, Step
from benchmarks.voxtral.table import report
from benchmarks.voxtral.variants import DEFAULT, VARIANTS

ROOT = Path(__file__).parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.voxtral", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="artifacts, results and logs; default build/voxtral-<scale>")
    parser.add_argument(
        "--cache", type=Path, help="folder of the compilers' files, as large as the .ptd; default FOLDER/cache"
    )
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--layers", type=int, help="layers of both networks, instead of the scale's")
    parser.add_argument("--variants", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}; default %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants lowered at a time")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="start no step after this time")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="end a step after this time")
    parser.add_argument("--lower-only", action="store_true", help="do not measure")
    parser.add_argument("--table", action="store_true", help="print the tables and do nothing else")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.variants = options.variants.split(",")
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers takes 1 or more")
    suffix = options.scale if options.layers is None else f"{options.scale}-{options.layers}"
    options.folder = (options.folder or ROOT / "build" / f"voxtral-{suffix}").absolute()
    options.cache = (options.cache or options.folder / "cache").absolute()
    return options


def sizes(options: argparse.Namespace) -> Dimensions:
    """The scale's dimensions, with the requested number of layers."""
    dimensions = SCALES[options.scale]
    if options.layers is None:
        return dimensions
    return replace(dimensions, layers=options.layers, audio_layers=options.layers)


def plan(options: argparse.Namespace) -> list[Step]:
    """The steps in their order: parallel ones first."""
    settings = {"scale": options.scale, "layers": options.layers}
    command = [sys.executable, "-m", "benchmarks.voxtral", "--folder", str(options.folder), "--scale", options.scale]
    command += ["--cache", str(options.cache), "--jobs", str(min(options.jobs, len(options.variants)))]
    if options.layers is not None:
        command += ["--layers", str(options.layers)]

    def step(name: str, needs: tuple[Step, ...] = (), parallel: bool = False) -> Step:
        return Step(name, [*command, "--step", name], settings, needs, parallel)

    lowering = {name: step(f"lower-{name}", parallel=True) for name in options.variants}
    if options.lower_only:
        return list(lowering.values())
    forms = dict.fromkeys(VARIANTS[name].reference for name in options.variants)
    reference = {form: step(f"reference-{form}") for form in forms}
    measuring = [
        step(f"measure-{name}", (lowering[name], reference[VARIANTS[name].reference])) for name in options.variants
    ]
    return [*lowering.values(), *reference.values(), *measuring]


class Environment:
    """A step's environment variables.

    Each step has a separate compiler cache: two variants with equal code compile it to the same path, and the backend
    removes the file after reading it.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, step: Step, jobs: int) -> Mapping[str, str]:
        """The threads of ``step``, which shares the processors with ``jobs`` - 1 others."""
        cores = len(os.sched_getaffinity(0))
        path = os.environ.get("PYTHONPATH")
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), path] if path else [str(ROOT)]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(max(1, cores // jobs)),
            # More than an equal share, since steps alternate between bursts and single-threaded phases.
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(cores, 2 * cores // jobs))),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / step.name),
        }


def perform(options: argparse.Namespace) -> None:
    """Run one step in this process."""
    import shutil

    import torch

    dimensions = sizes(options)
    kind, _, name = options.step.partition("-")
    if not torch.cuda.is_available():
        raise SystemExit(f"{options.step} needs a CUDA device")
    answers, results = options.folder / "answers", Results(options.folder)
    if kind == "lower":
        from benchmarks.voxtral.lowering import lower

        result = lower(VARIANTS[name], dimensions, options.folder / name, "cuda")
        result["jobs"] = options.jobs
        # This only helps a failed step when it is repeated.
        shutil.rmtree(options.cache / options.step, ignore_errors=True)
    elif kind == "reference":
        from benchmarks.voxtral.reference import refer

        answers.mkdir(exist_ok=True)
        result = refer(name, dimensions, answers / f"{name}.pt", "cuda")
    else:
        from benchmarks.voxtral.measuring import measure_artifact

        made, right = (results.read(step) for step in (f"lower-{name}", f"reference-{VARIANTS[name].reference}"))
        if made is None or right is None or made["weights"] != right["weights"]:
            raise SystemExit(f"{name} and its reference have different weights: build both again")
        result = measure_artifact(options.folder / name, answers / f"{VARIANTS[name].reference}.pt", dimensions)
    results.write(options.step, {"scale": options.scale, "layers": options.layers}, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; returns 0 if every step is done."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        perform(options)
        return 0
    results = Results(options.folder)
    done = True
    if not options.table:
        runner = Runner(results, Environment(options.cache), options.jobs, options.deadline, options.limit)
        done = runner.run(plan(options))
    found = {path.stem: result for path in options.folder.glob("*.json") if (result := results.read(path.stem))}
    if found:
        print(report(found, sizes(options)))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
