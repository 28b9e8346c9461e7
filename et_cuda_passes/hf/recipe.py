"""Recipes: a TOML file that gives single layers another scheme, group size or algorithm, or none.

.. code-block:: toml

    [[layer]]
    pattern = "lm_head"
    scheme = "8w"
    group_size = 0

    [[layer]]
    pattern = "re:model\\\\.layers\\\\.(0|29)\\\\..*"
    skip = true

The first entry whose pattern matches the FQN of a layer decides about it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.hf.support import ALGORITHMS, Scheme, nearest, parse_scheme

_KEYS = ("pattern", "scheme", "group_size", "algorithm", "skip")


@dataclass(frozen=True)
class Entry:
    """The values of a recipe for the layers that a pattern matches.

    Attributes:
        pattern: a glob in which ``*`` matches dots too, or after ``re:`` a regular expression for the whole name.
        scheme: the scheme, or None for that of the options.
        group_size: the group size, 0 for one scale per row, or None for that of the options.
        algorithm: the algorithm, or None for that of the options.
        skip: leave the layer as it is.
    """

    pattern: str
    scheme: Scheme | None = None
    group_size: int | None = None
    algorithm: str | None = None
    skip: bool = False

    def matches(self, fqn: str) -> bool:
        """Whether the pattern matches the FQN of a module or of its weight."""
        names = (fqn, f"{fqn}.weight" if fqn else "weight")
        if self.pattern.startswith("re:"):
            return any(re.fullmatch(self.pattern[3:], name) for name in names)
        return any(fnmatchcase(name, self.pattern) for name in names)


@dataclass(frozen=True)
class Recipe:
    """The entries of a recipe, in order.

    Attributes:
        entries: the first that matches a layer decides.
        source: the name of the file, for error messages.
    """

    entries: tuple[Entry, ...]
    source: str = "recipe"

    @staticmethod
    def load(recipe: "Recipe | Mapping[str, Any] | str | Path") -> "Recipe":
        """Read a recipe from a TOML file, or from the mapping that such a file stands for.

        Raises:
            ValueError: the file is not readable as TOML, or a key, a value or a pattern is wrong; the message says
                where.
            OSError: the file cannot be read.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return _parse(recipe, "recipe")
        if not isinstance(recipe, (str, Path)):
            raise UsageError(f"recipe is the path of a TOML file, or a mapping; got a {type(recipe).__name__}")
        path = Path(recipe)
        try:
            return _parse(tomllib.loads(path.read_text(encoding="utf-8")), path.name)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path.name} is not a TOML file: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The mapping that :meth:`load` reads."""
        layers = []
        for entry in self.entries:
            values = {key: getattr(entry, key) for key in _KEYS}
            values["scheme"] = None if entry.scheme is None else str(entry.scheme)
            layers.append({key: value for key, value in values.items() if value is not None and value is not False})
        return {"layer": layers}


def _parse(document: Mapping[str, Any], source: str) -> Recipe:
    for key in document:
        if key != "layer":
            raise UsageError(f"{source} has the unknown key {key!r}; a recipe consists of [[layer]] entries")
    layers = document.get("layer", [])
    if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
        raise UsageError(f"{source}: write each layer as [[layer]], in double brackets")
    if not layers:
        raise UsageError(f"{source} has no [[layer]] entry")
    return Recipe(tuple(_entry(layer, f"{source}, layer {n}") for n, layer in enumerate(layers, 1)), source)


def _entry(layer: Mapping[str, Any], place: str) -> Entry:
    for key in layer:
        if key not in _KEYS:
            raise UsageError(f"{place} has the unknown key {key!r}; {nearest(str(key), _KEYS)}")
    pattern = layer.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(f'{place} has no pattern; write pattern = "*.down_proj" or pattern = "re:..."')
    place = f"{place} ({pattern})"
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"{place}: the pattern is not a regular expression: {error}") from None
    skip = layer.get("skip", False)
    if not isinstance(skip, bool):
        raise UsageError(f"{place}: skip is true or false; got {skip!r}")
    others = [key for key in _KEYS[1:4] if key in layer]
    if skip and others:
        raise UsageError(f"{place} skips the layers and gives them a {others[0]} too; remove one of the two")
    if not skip and not others:
        raise UsageError(f"{place} changes nothing; give it a scheme, a group_size, an algorithm, or skip = true")
    group_size = layer.get("group_size")
    if group_size is not None:
        check_group_size(group_size, f"{place}: group_size")
    algorithm = layer.get("algorithm")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise UsageError(f"{place}: algorithm {algorithm!r} is unknown; {nearest(str(algorithm), ALGORITHMS)}")
    scheme = parse_scheme(layer["scheme"], f"{place}: scheme") if "scheme" in layer else None
    if scheme is not None and algorithm is not None and scheme.algorithm not in (None, algorithm):
        raise UsageError(f"{place}: {scheme.name} contains the algorithm {scheme.algorithm}; remove algorithm")
    return Entry(pattern, scheme, group_size, algorithm, skip)


def check_group_size(size: object, option: str, multiple: int = 2) -> None:
    """Check that a group size is 0, for one scale per row, or a positive multiple of ``multiple``.

    Raises:
        ValueError: it is not.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0 and size % multiple == 0:
        return
    nearby = ""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        below, above = size - size % multiple, size - size % multiple + multiple
        nearby = f"; the nearest are {below} and {above}" if below else f"; the nearest is {above}"
    raise UsageError(
        f"{option} must be 0, for one scale per row, or a positive multiple of {multiple}; got {size!r}{nearby}"
    )
