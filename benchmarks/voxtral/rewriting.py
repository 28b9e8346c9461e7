"""The time of rewriting Voxtral's methods, on a quiet machine and beside processes that use its cores.

    python -m benchmarks.voxtral.rewriting [--layers 10] [--busy 14]

Packing, checks and graph work; no lowering. The weights are random, created on the GPU if there is one,
and on the CPU when they are rewritten. With a GPU, a rewrite that packs there is timed too.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import torch

import et_cuda_passes as ecp
from benchmarks.voxtral.dimensions import SCALES
from benchmarks.voxtral.programs import export
from benchmarks.voxtral.variants import HINT
from benchmarks.voxtral.weights import build


def main() -> None:
    """Print the seconds of a rewrite of all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--busy", type=int, default=14, help="processes that compute beside the second rewrite")
    options = parser.parse_args()
    dimensions = replace(SCALES[options.scale], layers=options.layers, audio_layers=options.layers)
    model, _ = build(dimensions, "int4", "cuda" if torch.cuda.is_available() else "cpu")
    programs = export(model, dimensions, HINT)
    devices = [None, "cuda"] if torch.cuda.is_available() else [None]
    for busy, device in product((0, options.busy), devices):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            begin, linears = time.perf_counter(), 0
            for program in programs.values():
                _, report = ecp.rewrite(program, "cuda", gpu="sm_90", device=device)
                linears += report.counts()["rewritten"]
            elapsed = time.perf_counter() - begin
        finally:
            for other in others:
                other.kill()
        print(
            f"{busy} busy processes, {torch.get_num_threads()} threads, packed on the {'GPU' if device else 'CPU'}: "
            f"{linears} linears in {elapsed:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
