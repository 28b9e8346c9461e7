"""``generate``: text from an exported decoder, as it is generated."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from et_cuda_passes.cli.console import (
    LoweringError,
    Steps,
    UsageError,
    handle_errors,
    one_line,
    print_json,
    start_runtime,
)
from et_cuda_passes.cli.documents import Difference, Generate
from et_cuda_passes.cli.options import Debug, Device, Json, TargetOfExport

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_TOKENS = 256


class GenerationFailed(LoweringError):
    """The export does not run; exits with 1."""


def generate(
    export: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of an export, with its tokenizer.")],
    prompt: Annotated[str, typer.Option(help="The prompt; the chat template in OUT is put around it.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"By default {_DEFAULT_TOKENS}, or as many as fit.", show_default=False),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="Sampling temperature; 0 selects the most likely token.")
    ] = 0.0,
    device: Device = None,
    target: TargetOfExport = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also print the text of this model, and where the tokens first differ.",
            show_default=False,
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Execute the compiled libraries in OUT, which can do whatever you can."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text with the export in OUT.

    The text goes to stdout as it is generated, and the number of tokens per second after it.
    """
    with handle_errors(debug):
        _check_device(device)
        if compare is not None and temperature:
            raise UsageError("--compare compares the most likely tokens: leave --temperature out")
        generation = _import_generation(debug)
        try:
            steps = Steps(2 if as_json else 1)
            with steps as step:
                generation.check_export(export)
                tokenizer = generation.load_tokenizer(export)
                tokens = generation.encode(tokenizer, prompt)
                if not trust and target != "xnnpack":
                    raise UsageError(
                        f"{export} may contain compiled libraries, and to generate is to execute what their author put "
                        "there. They were not executed; give --trust if you know where they come from, or --target "
                        "xnnpack, which executes none"
                    )
                step(f"loading {export}")
                start_runtime()
                decoder = generation.ExportedDecoder(generation.load_exported(export, device, target))
            count = _count(decoder.room(tokens.shape[1]), max_new_tokens, tokens.shape[1])
        except generation.GenerationError as error:
            raise UsageError(str(error)) from error
        streamer = generation.TimedStreamer(tokenizer, silent=as_json)
        if as_json:
            with steps as step:
                step("generating")
                made = _generated(generation, decoder, tokens, count, temperature, streamer)
        else:
            # The text itself shows the progress.
            made = _generated(generation, decoder, tokens, count, temperature, streamer)
            typer.echo(str(streamer.speed))
        difference = None
        if compare is not None:
            difference, expected = _compare(generation, compare, tokenizer, tokens, made, count)
            if not as_json:
                _print_difference(difference, tokenizer, made, expected)
        if as_json:
            text, speed = tokenizer.decode(made, skip_special_tokens=True), streamer.speed
            print_json(Generate(text, len(made), speed.first, speed.rest, difference))


def _import_generation(debug: bool) -> Any:
    """The module that needs transformers."""
    try:
        from et_cuda_passes.hf import generation
    except ImportError as error:
        raise UsageError(f"generate needs transformers ({error}): pip install 'et-cuda-passes[hf]'") from error
    if not debug:
        generation.hide_warnings()
    return generation


def _check_device(text: str | None) -> None:
    import torch

    try:
        device = torch.device(text or "cpu")
    except RuntimeError:
        raise UsageError(f"--device {text}: there is no such device; write cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {text}: exports run on cpu and cuda only; write one of them")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {text}: torch finds no CUDA device here")


def _count(room: int | None, wanted: int | None, prompt: int) -> int:
    """The number of tokens to generate."""
    if room is None:
        return wanted or _DEFAULT_TOKENS
    if wanted is not None and wanted > room:
        raise UsageError(
            f"--max-new-tokens {wanted}: the cache of the export has room for {room} tokens after a prompt of {prompt}"
        )
    return wanted or min(_DEFAULT_TOKENS, room)


def _generated(
    generation: Any, model: Any, tokens: "Tensor", count: int, temperature: float, streamer: Any
) -> "Tensor":
    try:
        return generation.generate(model, tokens, count, temperature, streamer)  # type: ignore[no-any-return]
    except (ValueError, RuntimeError) as error:
        raise GenerationFailed(f"the export does not run: {one_line(error)} (--debug shows the traceback)") from error


def _compare(
    generation: Any, name: str, tokenizer: Any, tokens: "Tensor", made: "Tensor", count: int
) -> tuple[Difference, "Tensor"]:
    """The text of the model that was exported with the first token that differs from ``made``, and its tokens."""
    try:
        with Steps(2) as step:
            step(f"loading {name}")
            original = generation.load_original(name)
            step(f"generating with {name}")
            expected = generation.generate(original, tokens, count)
    except generation.GenerationError as error:
        raise UsageError(f"--compare {error}") from error
    text = tokenizer.decode(expected, skip_special_tokens=True)
    return Difference(name, text, generation.first_difference(made, expected)), expected


def _print_difference(found: Difference, tokenizer: Any, made: "Tensor", expected: "Tensor") -> None:
    typer.echo(f"{found.model}: {found.text}")
    position = found.position
    if position is None:
        typer.echo(f"all {len(made)} tokens are the same")
        return
    ours, theirs = (
        repr(tokenizer.decode(each[position])) if position < len(each) else "the end" for each in (made, expected)
    )
    typer.echo(f"token {position + 1} is the first that differs: {ours}, and {theirs} of {found.model}")
