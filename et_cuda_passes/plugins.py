"""Rules and targets of other packages: the entry points that are installed, and whether they are used.

Nothing here imports torch or another package: the names, packages and versions are in the metadata of the environment.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

RULES = "et_cuda_passes.rules"
"""The group of entry points of rules: each is a mapping from names of targets to rules that join their lists."""
TARGETS = "et_cuda_passes.targets"
"""The group of entry points of targets: the name of the entry point is that of the target."""
SWITCH = "ETCP_PLUGINS"
"""The environment variable: "0" switches off all plugins, "strict" makes each fault of one an error."""

Mode = Literal["0", "1", "strict"]


class PluginWarning(UserWarning):
    """A plugin has a fault, and is not used."""


class PluginError(ValueError):
    """A plugin has a fault, and ``ETCP_PLUGINS`` is "strict"."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Attributes:
        name: of the entry point.
        value: what it points to, "package.module:object".
        group: :data:`RULES` or :data:`TARGETS`.
        package: the name of the distribution.
        version: its version.
    """

    name: str
    value: str
    group: str
    package: str
    version: str

    @property
    def origin(self) -> str:
        """The package and its version, as in "my-rules 0.1.0"."""
        return f"{self.package} {self.version}".strip()

    def load(self) -> Any:
        """Import what the entry point points to; raises any Exception. Its output goes to stderr."""
        if EntryPoint.pattern.match(self.value) is None:
            raise ValueError("it is not of the form MODULE:NAME")
        try:
            with redirect_stdout(sys.stderr):
                return EntryPoint(self.name, self.value, self.group).load()
        except SystemExit as error:
            raise RuntimeError(f"the import ends the program: sys.exit({error.code!r})") from error


def mode() -> Mode:
    """The value of :data:`SWITCH`, "1" by default.

    Raises:
        PluginError: it has another value.
    """
    value = os.environ.get(SWITCH) or "1"
    if value not in get_args(Mode):
        raise PluginError(f"{SWITCH}={value}: write 0 to use no plugins, strict to make each fault an error, or 1")
    return value  # type: ignore[return-value]


@contextmanager
def switched(value: Mode) -> Iterator[None]:
    """Set :data:`SWITCH`, for processes that are started as well, until the block ends."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def installed(group: str) -> list[Plugin]:
    """The plugins of a group, by name and then by package; none if they are switched off."""
    return [] if mode() == "0" else list(_installed(group, tuple(sys.path)))


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """The plugins of a group in the packages on ``path``, which is ``sys.path``. To find them takes milliseconds."""
    found = {
        # A package without metadata has neither a name nor a version.
        Plugin(
            entry.name, entry.value, group, entry.dist.name or "a package without metadata", entry.dist.version or ""
        )
        for entry in entry_points(group=group)
        if entry.dist is not None
    }
    return tuple(sorted(found, key=lambda each: (each.name, each.package, each.version, each.value)))


REINSTALL = "install it again with its dependencies, or uninstall it"
CORRECT = "correct the package, or install a version of it without the fault"


def import_fix(error: BaseException | None) -> str:
    """The fix for a package whose import raised ``error``."""
    return REINSTALL if isinstance(error, ImportError) else CORRECT


_reported: dict[str, Plugin] = {}
"""The text of each warning, with its plugin."""


def has_fault(plugin: Plugin) -> bool:
    """Whether a warning about the plugin was given."""
    return plugin in _reported.values()


def report_fault(plugin: Plugin, fault: str, fix: str, unused: str = "the plugin") -> None:
    """Warn once that a plugin, or the part of it that ``unused`` names, is not used.

    Raises:
        PluginError: instead of the warning, if :data:`SWITCH` is "strict".
    """
    kind = "rules" if plugin.group == RULES else "target"
    text = f"plugin {plugin.name} ({kind}) of {plugin.origin}: {fault}; {fix}"
    if mode() == "strict":
        raise PluginError(text)
    if text not in _reported:
        _reported[text] = plugin
        fallback = f"{unused[:1].upper()}{unused[1:]} is not used ({SWITCH}=0 or --no-plugins uses no plugins at all)"
        warnings.warn(f"{text}. {fallback}", PluginWarning, stacklevel=2)
