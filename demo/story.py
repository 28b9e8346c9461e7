"""The demo as one function of named steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from demo import show
from demo.generate import ROUNDS, check_fits, compile_for_cpu, load_package, save_errors, take_turns
from demo.model import Source
from demo.program import export, quantize, report_of, save_rewritten
from demo.workspace import Screen, Workspace

STEPS = 9


@dataclass(frozen=True)
class Settings:
    """The options of the command line."""

    work_dir: Path
    tokens: int
    prompts: Sequence[str]
    fresh: bool = False


def demo(settings: Settings, source: Source, console: Console) -> None:
    """Quantize once, export once; rewrite the program for cuda and for cpu; run it beside the unquantized model.

    Raises:
        ValueError: a prompt and its answer do not fit into the exported program's cache.
    """
    show.opening(console, source.name)
    tokenizer = source.tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in settings.prompts]
    check_fits(prompts, settings.tokens, source.cache_length)

    with Screen(console, STEPS) as screen:
        files = Workspace.for_model(settings.work_dir, source.name, screen, settings.fresh)
        rewritten = files.after_rewriting()
        model, program = cache(source.model), cache(torch.export.load)

        # Quantization changes the model in place, so the unquantized export comes first.
        bf16 = files.make(
            "bf16.pt2",
            "load the model in bfloat16, export it",
            lambda path: torch.export.save(export(model(), source.cache_length), path),
        )
        int4 = files.make(
            "int4.pt2",
            "quantize to int4, export once with a dynamic length",
            lambda path: torch.export.save(export(quantize(model()), source.cache_length), path),
        )
        model.cache_clear()

        # For a GPU: rewritten on the host, and lowered if the machine has one.
        cuda = rewritten.make(
            "cuda.pt2", "rewrite that program for cuda", lambda path: save_rewritten(program(int4), "cuda", path)
        )
        lowered = None
        if torch.cuda.is_available():
            # The import of ExecuTorch takes seconds.
            from et_cuda_passes.executorch.lower import lower

            lowered = rewritten.make(
                "cuda",
                "lower the packed program to .pte and .ptd",
                lambda path: lower(program(cuda), "cuda", path, "model"),
            )
        else:
            screen.done("lower the packed program to .pte and .ptd", "needs a GPU")

        # For this CPU: rewritten, compiled and run.
        cpu = rewritten.make(
            "cpu.pt2", "rewrite the same program for cpu", lambda path: save_rewritten(program(int4), "cpu", path)
        )
        compiled_bf16 = files.make(
            "bf16-compiled.pt2",
            "compile the unquantized program with AOTInductor",
            lambda path: compile_for_cpu(program(bf16), path),
        )
        compiled_int4 = rewritten.make(
            "cpu-compiled.pt2",
            "compile the packed program with AOTInductor",
            lambda path: compile_for_cpu(program(cpu), path),
        )
        program.cache_clear()
        runs = {"unquantized bf16": load_package(compiled_bf16), "packed int4": load_package(compiled_int4)}
        exported = dict(zip(runs, (bf16, int4), strict=True))
        errors = rewritten.make(
            "errors.json",
            "compare both with their exported programs in eager",
            lambda path: save_errors(runs, exported, prompts[0], path),
        )
        with screen.step("generate text with both, in turns", ROUNDS * len(runs) * len(prompts)) as advance:
            results = take_turns(runs, prompts, settings.tokens, tokenizer.end, advance)

    show.reports(console, [report_of(cuda), report_of(cpu)])
    show.sizes(
        console,
        {
            "bf16.pt2": (bf16, "exported, unquantized"),
            "int4.pt2": (int4, "exported, generic int4: a byte for each weight"),
            "cuda.pt2": (cuda, "rewritten for cuda: packed"),
            "bf16-compiled.pt2": (compiled_bf16, "compiled for this CPU, unquantized"),
            "cpu-compiled.pt2": (compiled_int4, "compiled for this CPU, packed"),
        },
    )
    show.errors(console, errors)
    show.answers(console, settings.prompts, results, tokenizer)
    show.speeds(console, results)
    show.closing(console, cuda, lowered)
