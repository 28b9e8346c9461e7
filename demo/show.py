"""The output of the demo."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from demo.generate import Result
from demo.model import Tokenizer
from demo.workspace import size_of


def opening(console: Console, model: str) -> None:
    """Print the model and the machine."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao", "executorch"))
    console.print(Text(f"{model}: int4 weights in groups of 32, for a GPU and for this CPU", style="bold"))
    console.print(
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads; {packages}\n",
        highlight=False,
    )


def reports(console: Console, texts: Sequence[str]) -> None:
    """Print the results of the rewrites."""
    _heading(console, "Results of the rewrites")
    for text in texts:
        console.print(text, highlight=False, markup=False)


def sizes(console: Console, files: Mapping[str, tuple[Path, str]]) -> None:
    """Print the sizes of the files on disk."""
    _heading(console, "Sizes on disk, in MB (in each the embedding, which stays bfloat16)")
    table = _table("", show_header=False)
    for name, (path, what) in files.items():
        table.add_row(f"{name:<18} {what}", f"{size_of(path) / 1e6:.1f}")
    _indented(console, table)


def errors(console: Console, path: Path) -> None:
    """Print the error of compiling, and of packing and compiling."""
    _heading(console, "Logits of the compiled program against the exported one in eager, relative error")
    table = _table("", show_header=False)
    for name, error in json.loads(path.read_text(encoding="utf-8")).items():
        table.add_row(name, f"{error:.4f}")
    _indented(console, table)


def answers(console: Console, prompts: Sequence[str], results: Mapping[str, Result], tokenizer: Tokenizer) -> None:
    """Print every prompt with the answers of all programs."""
    for number, prompt in enumerate(prompts):
        _heading(console, prompt)
        for name, result in results.items():
            text = tokenizer.decode(result.answers[number].tokens)
            console.print(f"  {name + ':':<18} {text}", highlight=False, markup=False)


def speeds(console: Console, results: Mapping[str, Result]) -> None:
    """Print the speed of each program."""
    _heading(console, "Speed on this CPU, both compiled with AOTInductor")
    table = _table("tokens/s", "ms to the first token")
    for name, result in results.items():
        table.add_row(name, f"{result.tokens_per_second:.1f}", f"{result.seconds_to_first * 1e3:.0f}")
    _indented(console, table)


def closing(console: Console, cuda: Path, lowered: Path | None) -> None:
    """Print the files for ExecuTorch, or the command that writes them."""
    console.print()
    if lowered is None:
        what = f"The last step for cuda needs a GPU. On a machine with one: et-cuda-passes lower {cuda} --target cuda"
        console.print(what, highlight=False, markup=False)
        return
    for file in sorted(lowered.iterdir()):
        console.print(f"For ExecuTorch: {file} ({size_of(file) / 1e6:.1f} MB)", highlight=False, markup=False)


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _indented(console: Console, table: Table) -> None:
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _table(*columns: str, show_header: bool = True) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=show_header)
    table.add_column()
    for column in columns:
        table.add_column(column, justify="right")
    return table
