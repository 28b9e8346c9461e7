"""The application: every command has the options about other packages, and they may also stand before the command."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Annotated, Any, TypeVar

import typer

from et_cuda_passes.cli.console import one_line, quiet_import
from et_cuda_passes.plugins import Mode, switched

Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="PACKAGE", help="Import a package first, which registers operators of its own."),
]
NoPlugins = Annotated[bool, typer.Option("--no-plugins", help="Use no rules and targets of other packages.")]
StrictPlugins = Annotated[
    bool, typer.Option("--strict-plugins", help="A plugin with a fault is an error, not a warning.")
]
COMMON: dict[str, tuple[Any, Any]] = {
    "imported_packages": (Imports, None),
    "no_plugins": (NoPlugins, False),
    "strict_plugins": (StrictPlugins, False),
}


Function = TypeVar("Function", bound=Callable[..., Any])


class App(typer.Typer):
    """A Typer application that gives each command the options of :data:`COMMON`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """As Typer's."""
        register = super().command(name, **options)

        def decorate(function: Function) -> Function:
            register(_with_common_options(function))
            return function

        return decorate


def _with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        common = {name: kwargs.pop(name) for name in COMMON}
        with common_options(**common):
            return function(*args, **kwargs)

    signature = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in COMMON.items()
    ]
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    call.__annotations__ = {**function.__annotations__, **{name: kind for name, (kind, _) in COMMON.items()}}
    return call


@contextmanager
def common_options(imported_packages: Sequence[str] | None, no_plugins: bool, strict_plugins: bool) -> Iterator[None]:
    """Apply the options of :data:`COMMON` until the block ends."""
    if no_plugins and strict_plugins:
        raise typer.BadParameter("--no-plugins uses none, and --strict-plugins is about those that are used: give one")
    value: Mode | None = "0" if no_plugins else "strict" if strict_plugins else None
    with nullcontext() if value is None else switched(value):
        for package in imported_packages or ():
            try:
                with quiet_import(False):
                    import_module(package)
            except Exception as error:  # the import of another package raises anything
                raise typer.BadParameter(
                    f"{package} cannot be imported ({one_line(error)}); install it, or put its folder on PYTHONPATH"
                ) from error
        yield
