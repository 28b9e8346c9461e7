"""Write docs/reference from the code, and check every link of the documentation.

Run as ``python -m docs.generate`` (``make docs``) from the root of the repository. The pages are computed only
from the registered rules, targets and operators, so the same code gives the same bytes; a test compares them.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

import et_cuda_passes as ecp
from docs.api import api_page, testing_page
from docs.json_documents import json_page, schemas_json
from docs.markdown import described, docstring, plain_marks, table
from et_cuda_passes.cli import app
from et_cuda_passes.cli.listing import describe_rule
from et_cuda_passes.hf.support import (
    FOR_EMBEDDINGS,
    GROUP_SIZES,
    SCHEMES,
    Scheme,
    Status,
    formats,
    parse_scheme,
    support,
    usual_support,
)
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.plugins import switched
from et_cuda_passes.targets import get_target

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTICE = "<!-- Written by `make docs` from the code. Change the code, not this page. -->"


def rules() -> dict[str, tuple[Any, list[str]]]:
    """Each rule by name, with the targets that have it in their default list."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for target in ecp.targets():
        for entry in ecp.default_passes(target):
            if isinstance(entry, ecp.Rule):
                found.setdefault(entry.name, (entry, []))[1].append(target)
    return dict(sorted(found.items()))


def plain(value: Any) -> str:
    """A value of a target as text for a table."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == ():
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def rules_json() -> str:
    """The rules of each target as data, for ``et-cuda-passes rules``, which does not import them."""
    about = {
        name: {
            "summary": get_target(name).summary,
            "passes": [describe_rule(entry) for entry in ecp.default_passes(name)],
        }
        for name in ecp.targets()
    }
    return json.dumps(about, indent=2, default=str) + "\n"


def rules_page() -> str:
    """Every rule: its rewrite, targets and options, and its requirements with the hints of a report."""
    parts = [
        "# Rules",
        "In the order of their names. A rule rewrites a match if all of its requirements hold. The requirements that "
        "fail are the reasons of a miss, each with its hint.",
    ]
    for name, (rule, targets) in rules().items():
        cls = type(rule)
        prose = described(cls)[0]
        options: dict[str, str] = {}
        for base in reversed(cls.__mro__[:-1]):
            options |= described(base)[1]
        listed = ", ".join(f"[{target}](targets.md#{target})" for target in targets)
        parts += [f"## {name}", f"```text\n{docstring(cls)[0]}\n```"]
        parts += [prose] if prose else []
        parts.append(f"`{cls.__name__}`, in the list of {listed}.")
        fields = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
        if fields:
            rows = [(f"`{f.name}`", f"`{getattr(rule, f.name)!r}`", options.get(f.name, "")) for f in fields]
            parts.append(table(["option", "default", "meaning"], rows))
        if rule.requirements:
            rows = [(need.wanted, need.stage, need.hint or "depends on what is found") for need in rule.requirements]
            parts.append(table(["requires", "read from", "hint"], rows))
    return "\n\n".join(parts)


def targets_page() -> str:
    """Every target: its kernels as data, and its list of passes."""
    parts = [
        "# Targets",
        "The abilities of a kernel are data that rules read as `m.target`. A place that a kernel does not support is a "
        "miss with its reason. The first kernel of a family is its default.",
    ]
    for name in ecp.targets():
        target = get_target(name)
        parts += [f"## {name}", target.summary + "."]
        columns = [field.name for field in dataclasses.fields(Kernel) if field.name != "host_notes"]
        rows = [
            [family, *(plain(getattr(kernel, column)) for column in columns)]
            for family, kernels in target.kernels.items()
            for kernel in kernels
        ]
        if rows:
            parts.append(table(["family", *(column.replace("_", " ") for column in columns)], rows))
        kernels = [kernel for family in target.kernels.values() for kernel in family]
        notes = {text: kernel.name for kernel in kernels for text in kernel.host_notes.values()}
        parts += [f"A report says of `{kernel}`: {text}." for text, kernel in notes.items()]
        entries = [entry.name for entry in ecp.default_passes(name)]
        parts.append("Passes, in order: " + ", ".join(f"[{entry}](rules.md#{entry})" for entry in entries) + ".")
    parts.append("## Columns of the tables")
    meanings = ((name.replace("_", " "), text) for name, text in described(Kernel)[1].items() if name != "host_notes")
    parts.append(table(["column", "meaning"], meanings))
    return "\n\n".join(parts)


def operators_page() -> str:
    """Every operator that the package registers, by its schema."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("et_cuda_passes::"))
    parts = [
        "# Operators",
        "Registered when the package is imported, in the namespace `et_cuda_passes`. "
        "[Why they exist](../explanation/own-operators.md).",
    ]
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator.partition(".")[0])
        overload = getattr(packet, operator.partition(".")[2] or "default")
        parts.append(f"```text\n{overload._schema}\n```")
    return "\n\n".join(parts)


def supported(scheme: Scheme, target: str, kind: str = "linear") -> str:
    """The outcome of a scheme on a target, and that of its fallback."""
    if scheme.only_for not in (None, target):
        return f"{Status.IMPOSSIBLE}: for {scheme.only_for} alone"
    found = usual_support(scheme, target, kind=kind)
    text = f"{found.status}: {found.detail}" if found.detail else str(found.status)
    # 16 is the only usual group size that divides 272.
    return text if scheme.fallback is None else f"{text}; else {support(scheme.fallback, 0, 272, target).status}"


def dtypes_of(scheme: Scheme, target: str) -> str:
    """The dtypes of models for whose linears the target has a kernel, and those that it has by the option."""
    if scheme.only_for not in (None, target):
        return "none"
    size = next((size for size in (32, 0) if support(scheme, size, 256, target).status.has_kernel), 0)

    def has_kernel(dtype: torch.dtype, cast: bool = False) -> bool:
        return support(scheme, size, 256, target, dtype=dtype, cast_to_bf16=cast).status.has_kernel

    found = [plain(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32) if has_kernel(dtype)]
    if not has_kernel(torch.float32) and has_kernel(torch.float32, cast=True):
        found.append("float32 with `cast_to_bf16`")
    return ", ".join(found) or "none"


def schemes_page() -> str:
    """Every scheme with what each target does with it, and the packing formats with their group sizes."""
    names = ecp.targets()
    linear = [(f"`{each}`", each.summary, *(supported(each, name) for name in names)) for each in SCHEMES.values()]
    both = parse_scheme("8da4w,8da8w")
    summary = "8da4w, and 8da8w where the group size does not divide in_features"
    linear.append((f"`{both}`", summary, *(supported(both, name) for name in names)))
    tables = [
        (f"`{name}`", *(supported(SCHEMES[name], each, "embedding") for each in names)) for name in FOR_EMBEDDINGS
    ]
    dtypes = [(f"`{each.name}`", *(dtypes_of(each, name) for name in names)) for each in SCHEMES.values()]
    promises = [
        f"`{name}:{each.name}`"
        for name in names
        for each in SCHEMES.values()
        if each.only_for in (None, name) and usual_support(each, name).status.has_kernel
    ]
    packing = [
        (
            f"`{layout}`" + (" (default)" if layout == formats(name)[0] else ""),
            name,
            ", ".join(
                str(size)
                for size in sorted((*GROUP_SIZES, 256))
                if layout in support(SCHEMES["4w"], size, 1024, name, layout).layouts
            ),
        )
        for name in names
        for layout in formats(name)
    ]
    meanings = [
        (str(Status.PACKED), "the rewrite packs the weight for a kernel of the target"),
        (str(Status.KEPT), "the backend has a kernel that reads the weight as it was exported"),
        (str(Status.FOLDED), "the weight becomes floating-point again: right, but as large as before"),
        (str(Status.IMPOSSIBLE), "the target has no kernel; `quantize_model_` refuses the scheme for this target"),
    ]
    return "\n\n".join(
        [
            "# Schemes",
            "Each cell comes from a small layer that was quantized, exported and rewritten for the target, with the "
            "better of bfloat16 and float32. [How to quantize](../how-to/quantize.md) says how a scheme is chosen.",
            table(["word", "meaning"], meanings),
            "## Linears",
            "With groups of 32 if the target has them, else with one scale per row.",
            table(["scheme", "meaning", *names], linear),
            "`TARGET:SCHEME` promises that the target has a kernel for each layer; a rewrite that misses one then "
            f"fails. The promises that can be kept: {', '.join(promises)}.",
            "## Dtypes of the model",
            "The dtypes of a model whose linears the target packs or keeps. With the option `cast_to_bf16` the kernels "
            "of cuda compute a float32 model's linears in bfloat16, so that one export serves xnnpack too.",
            table(["scheme", *names], dtypes),
            "## Embeddings",
            "With one scale per row.",
            table(["scheme", *names], tables),
            "## Packing formats",
            "`qlinear_packing_format` selects the kernel of 4-bit linears and does not change the quantization. "
            "Multiples of a group size are valid too.",
            table(["format", "target", "group sizes"], packing),
        ]
    )


# README ---------------------------------------------------------------------------------------------------------------

_BACKENDS = {
    "cuda": ("executorch 1.5.1, on one H200", "run"),
    "metal": ("executorch 1.5.1", "rewritten only"),
    "xnnpack": ("executorch 1.5.1", "run"),
    "cpu": ("torch 2.13 to 2.15", "run"),
    "vulkan": ("executorch 1.5.1", "lowered, and its constants read back"),
    "coreml": ("executorch 1.5.1, coremltools 9.0", "lowered, and its constants read back"),
    "openvino": ("executorch 1.5.1, openvino 2025.4", "run"),
    "mlx": ("executorch 1.5.1", "its source read"),
    "tensorrt": ("torch-tensorrt after 2.14", "predicted only"),
}
"""The backend of each target with the version that was tested, and how the row of the table was tested."""
_WORDS = {Status.IMPOSSIBLE: "refused"}
_MARKS = ("<!-- targets and schemes, written by `make docs` -->", "<!-- end of targets and schemes -->")


def matrix() -> str:
    """The outcome of a layer of each scheme on each target, in one word."""

    def word(scheme: Scheme, target: str, kind: str = "linear") -> str:
        if scheme.only_for not in (None, target):
            return "refused"
        status = usual_support(scheme, target, kind=kind).status
        if kind == "experts" and not status.has_kernel:
            return "float"
        return _WORDS.get(status, str(status))

    rows = []
    for target in ecp.targets():
        linears = (word(scheme, target) for scheme in SCHEMES.values() if scheme.algorithm is None)
        tables = (word(SCHEMES[name], target, "embedding") for name in ("4w", "8w"))
        rows.append((f"`{target}`", *linears, word(SCHEMES["4w"], target, "experts"), *tables, *_BACKENDS[target]))
    schemes = (name for name, scheme in SCHEMES.items() if scheme.algorithm is None)
    kinds = ("experts 4w", "embedding 4w", "embedding 8w")
    return table(["target", *schemes, *kinds, "tested with", "and how"], rows)


def readme() -> str:
    """README with its table of targets and schemes."""
    first, last = _MARKS
    before, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(first)
    return f"{before}{first}\n\n{matrix()}\n\n{last}{rest.partition(last)[2]}"


# The command line -----------------------------------------------------------------------------------------------------


def command_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        f"```text\net-cuda-passes [OPTIONS] COMMAND [ARGS]\n```\n\n{group.help}",
        "Results go to stdout, and progress, warnings and errors go to stderr. `python -m et_cuda_passes` is the same "
        "program.",
        "## Exit codes",
        table(
            ["code", "meaning"],
            [
                (0, "success"),
                (1, "the command failed, or its answer is no: each command says what that is"),
                (2, "bad usage: an unknown option or value, or a MODEL that is not what the command takes"),
                (130, "interrupted with Ctrl-C; 143 by SIGTERM. No file is half written"),
            ],
        ),
        "An error is one line on stderr, `error: ...`, with the cause and the fix. `--debug` adds the traceback. An "
        "unknown option or command, or a missing one, is an error of the parser: the usage, and a line `Error: ...`. "
        "A reader of stdout that leaves early, such as `head`, is no error, and nothing is printed about it; the code "
        "is then 0, or 1 if the output was cut off.",
        "## Completion",
        "`et-cuda-passes --install-completion` installs completion for the shell that runs: bash, zsh, fish or "
        "PowerShell. `--show-completion` prints its script. Names of targets, GPUs, schemes and rules are completed "
        "too, and none of this imports torch.",
        "## Progress",
        "Each step prints a line when it ends: the percentage of the command's work that is done, the step, its time, "
        "and the largest resident memory of the process during the step. While a step runs, a terminal shows it in a "
        "line that changes. Without a terminal, a line comes every ten seconds. Within a rewrite the percentage counts "
        "weights. ExecuTorch and AOTInductor say nothing about their progress: a lowering counts as one step for each "
        "method that is decomposed or compiled, and one for what ExecuTorch does with all methods. There is no "
        "percentage as long as the number of steps is not known: `export` has to load and split the model first.",
        "## What other libraries print",
        "torchao logs a line `Failed to load ...so` for each of its libraries that does not fit the machine, and torch "
        "logs deprecations. The command line disables Python's logging while it imports them, and the progress bars "
        "and warnings of coremltools. Your own program can do "
        'the same before the import: `logging.getLogger("torchao").setLevel(logging.ERROR)`. torchao\'s environment '
        "variable `TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1` is no help: it logs another line, and also leaves out the "
        "libraries that would load. With `--debug` all lines appear.",
        "## Options before a command",
        options_table(group),
    ]
    for name, command in group.commands.items():
        arguments = [each.metavar or each.name.upper() for each in command.params if each.param_type_name == "argument"]
        usage = " ".join(["et-cuda-passes", name, "[OPTIONS]", *arguments])
        parts += [f"## {name}", f"```text\n{usage}\n```", plain_marks(inspect.cleandoc(command.help or ""))]
        parts.append(options_table(command))
        parts += [f"{command.epilog}"] if command.epilog else []
    return "\n\n".join(parts)


def options_table(command: Any) -> str:
    """The arguments and options of a command."""
    rows = []
    for each in command.params:
        if each.param_type_name == "argument":
            names = each.metavar or each.name.upper()
        else:
            names = ", ".join(name for name in each.opts if "_" not in name)
            names += f" {each.metavar}" if each.metavar else ""
        default = "required" if each.required else ""
        if not each.required and each.default not in (None, False, ()):
            default = f"`{each.default}`"
        rows.append((f"`{names}`", each.help or "", default))
    return table(["option", "meaning", "default"], rows)


_REFERENCE_PAGES: Mapping[str, Callable[[], str]] = {
    "api.md": api_page,
    "rules.md": rules_page,
    "targets.md": targets_page,
    "operators.md": operators_page,
    "schemes.md": schemes_page,
    "command-line.md": command_page,
    "json.md": json_page,
    "testing.md": testing_page,
}
_OTHERS: Mapping[Path, Callable[[], str]] = {
    ROOT / "et_cuda_passes" / "cli" / "rules.json": rules_json,
    ROOT / "et_cuda_passes" / "cli" / "schemas.json": schemas_json,
    ROOT / "README.md": readme,
}
PAGES = (*(REFERENCE / name for name in _REFERENCE_PAGES), *_OTHERS)
"""The paths of all generated pages."""


def page(path: Path) -> str:
    """The text of a generated page."""
    with switched("0"):
        if path in _OTHERS:
            return _OTHERS[path]()
        # The heading comes first: it is the title of the page on the site.
        return _REFERENCE_PAGES[path.name]().replace("\n\n", f"\n\n{NOTICE}\n\n", 1) + "\n"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts spell them."""
    headings = re.findall(
        r"^#+ +(.*?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root: Path = ROOT) -> Iterator[str]:
    """Each relative link of README, CONTRIBUTING and docs without a target, as ``page: link``."""
    for page in [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                yield f"{page.relative_to(root).as_posix()}: {link}"


def main() -> int:
    """Write the pages and check the links; returns 1 if a link is broken."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
        print(path.relative_to(ROOT).as_posix())
    broken = list(broken_links())
    for link in broken:
        print(f"broken link: {link}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
