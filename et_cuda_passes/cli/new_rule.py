"""``new-rule``: the files of a new rule, which works at once, or of a package with it."""

import keyword
import re
import shlex
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from et_cuda_passes.cli.console import UsageError, handle_errors_without_torch, print_json
from et_cuda_passes.cli.documents import NewRule, files_of
from et_cuda_passes.cli.listing import own_rules
from et_cuda_passes.cli.options import TARGETS, Json, TargetWithDefault
from et_cuda_passes.plugins import TARGETS as TARGET_GROUP
from et_cuda_passes.plugins import installed

_TEMPLATES = Path(__file__).parent / "templates"


def new_rule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the rule, in snake case: write_silu.")],
    target: TargetWithDefault = "cpu",
    package: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a package that pip can install to this new folder, with an entry point for the rule.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the file of a new rule and its test, which pass at once: edit them.

    Without --package, NAME.py and test_NAME.py are written to the current folder.
    """
    with handle_errors_without_torch():
        _check_name(name)
        _check_target(target)
        files = _files(name, target, package)
        for path in files:
            if path.exists() or path.is_symlink():
                raise UsageError(f"{path} exists, and is not overwritten: give the rule another name, or move the file")
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if as_json:
            print_json(NewRule(name, target, files_of(files)))
            return
        typer.echo("\n".join(f"wrote {path}" for path in files))
        if package is None:
            typer.echo(
                f"test it with: python -m pytest {next(path for path in files if path.stem.startswith('test_'))}"
            )
        else:
            typer.echo(f"install it with: python -m pip install -e {shlex.quote(str(package))}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
        usable = words and not words[0][0].isdigit() and name.isascii()
        proposed = "_".join(words).lower() if usable else "write_silu"
        raise UsageError(f"NAME {name!r} is not in snake case: write lower-case words and underscores, as {proposed}")
    if keyword.iskeyword(name) or name in ("missed", "kept", "rewritten"):
        kind = "a keyword of Python" if keyword.iskeyword(name) else "a status in reports"
        raise UsageError(f"NAME {name} is {kind}: give the rule another name, such as {name}_rule")
    if name.startswith("test_"):
        raise UsageError(f"NAME {name}: pytest takes a file of this name for a test: name the rule {name[5:]}")
    if name in ("torch", "et_cuda_passes", "example", "tests"):
        raise UsageError(f"NAME {name} is the name of another module: give the rule another name, such as my_{name}")
    if any(entry["name"] == name for each in own_rules().values() for entry in each["passes"]):
        raise UsageError(f"NAME {name} is the name of a rule of et_cuda_passes: give the rule another name")


def _check_target(target: str) -> None:
    if re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise UsageError(
            f"--target {target}: a rule joins the list of a target by its name; for a target of your own, write "
            "the rule into its passes"
        )
    known = [*TARGETS, *(plugin.name for plugin in installed(TARGET_GROUP))]
    if target not in known:
        raise UsageError(f"--target {target}: there is no such target; known are {', '.join(known)}")


def _files(name: str, target: str, package: Path | None) -> dict[Path, str]:
    """The texts of the files by their paths."""
    values = {"name": name, "target": target, "class_name": "".join(part.capitalize() for part in name.split("_"))}
    if package is None:
        imported = f"from {name} import {values['class_name']}\n"
        return {
            Path(f"{name}.py"): _text("rule.py", values),
            Path(f"test_{name}.py"): _text("test.py", values | {"import_rule": imported}),
        }
    distribution = re.sub(r"[^a-z0-9]+", "-", package.absolute().name.lower()).strip("-")
    module = distribution.replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module) or module in ("tests", "torch", "et_cuda_passes", name):
        raise UsageError(
            f"--package {package}: the package would have the name {module!r}; name the folder as a package, for "
            "example my-rules, and otherwise than the rule"
        )
    if package.is_dir() and any(package.iterdir()):
        raise UsageError(
            f"--package {package}: the folder has files, and is not changed: name a new one. To add a rule to a "
            "package, run new-rule without --package in the folder of its modules, and add the rule to its RULES"
        )
    if package.exists() and not package.is_dir():
        raise UsageError(f"--package {package} is a file: name a new folder")
    values |= {"distribution": distribution, "module": module}
    imported = f"\nfrom {module} import {values['class_name']}"
    return {
        package / "pyproject.toml": _text("pyproject.toml", values),
        package / module / "__init__.py": _text("init.py", values),
        package / module / f"{name}.py": _text("rule.py", values),
        package / module / "example.py": _text("example.py", values),
        package / "tests" / f"test_{name}.py": _text("test.py", values | {"import_rule": imported}),
    }


def _text(template: str, values: dict[str, str]) -> str:
    return Template((_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(values)
