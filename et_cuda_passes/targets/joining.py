"""The rules of other packages that join the default lists of the targets."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from et_cuda_passes.graph.passes import nearest_names, parse
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.plugins import CORRECT, RULES, TARGETS, Mode, Plugin, import_fix, installed, mode, report_fault

_FORM = 'an entry point in the group et_cuda_passes.rules is a mapping such as {"cuda": [MyRule()]}'


@dataclass(frozen=True)
class _Joining:
    """A rule of a plugin, with the target whose list it joins."""

    rule: Rule
    target: str
    plugin: Plugin


_origins: dict[type, str] = {}
"""The package and version of each class of rules that a plugin brought."""


def origin_of(rule: Any) -> str:
    """The package and version that brought a rule, as in "my-rules 0.1.0"; empty for a rule of no plugin.

    A rule that was imported without its plugin belongs to the plugin in the same top-level module.
    """
    if type(rule) in _origins:
        return _origins[type(rule)]
    module = type(rule).__module__.partition(".")[0]
    plugins = (*installed(RULES), *installed(TARGETS))
    return next((each.origin for each in plugins if re.split("[.:]", each.value)[0] == module), "")


def remember_origin(rule: Rule, plugin: Plugin) -> None:
    """Note that ``plugin`` brought the class of ``rule``, unless that is one of this package."""
    if not type(rule).__module__.startswith("et_cuda_passes."):
        _origins.setdefault(type(rule), plugin.origin)


def with_plugins(
    target: str,
    listed: Sequence[Rule],
    own: Mapping[str, Iterable[Rule]],
    other_targets: Iterable[str],
    renamed: Mapping[str, str],
) -> list[Rule]:
    """The list of a target, with the rules of plugins that join it, each where its ``before`` and ``after`` put it.

    A rule without either comes last. Rules of plugins join in the order of their names. A rule that cannot join is
    reported, and the list is that without it.

    Args:
        target: the name of the target.
        listed: its own rules.
        own: the rules of each target of this package: their names cannot be used again, and ``before`` and ``after``
            may contain them.
        other_targets: the names of the targets of plugins.
        renamed: former names of rules, for error messages.
    """
    plugins = tuple(installed(RULES))
    if not plugins:
        return list(listed)
    reserved = frozenset(rule.name for rules in own.values() for rule in rules)
    joining = _joining(plugins, frozenset([*own, target, *other_targets]), reserved, mode())
    known = {*reserved, *(rule.name for rule in listed), *(each.rule.name for each in joining)}
    result = list(listed)
    for each in joining:
        if each.target == target:
            try:
                entries = parse([*result, each.rule], lambda _: False, known, renamed)
            except Exception as error:  # pattern() of another package raises anything
                fault = f"rule {each.rule.name} cannot join the list of {target}: {error}"
                report_fault(each.plugin, fault, CORRECT, f"rule {each.rule.name}")
            else:
                result = [entry.value for entry in entries]
    return result


@cache
def _joining(
    plugins: tuple[Plugin, ...], targets: frozenset[str], reserved: frozenset[str], _: Mode
) -> tuple[_Joining, ...]:
    """The rules of all plugins that are valid by themselves, by name. The mode is a part of the key of the cache."""
    found: list[_Joining] = []
    owner: dict[str, Plugin] = {}
    for plugin in plugins:
        for target, rule in _rules_of(plugin, targets):
            first = owner.setdefault(rule.name, plugin)
            if rule.name in reserved:
                report_fault(
                    plugin,
                    f"the name of its rule {rule.name} is that of a rule of this package",
                    _RENAME,
                    f"rule {rule.name}",
                )
            elif first is not plugin:
                where = f"{first.origin} (plugin {first.name})"
                report_fault(
                    plugin,
                    f"the name of its rule {rule.name} is that of a rule of {where}",
                    _RENAME,
                    f"rule {rule.name}",
                )
            else:
                remember_origin(rule, plugin)
                found.append(_Joining(rule, target, plugin))
    return tuple(sorted(found, key=lambda each: each.rule.name))


_RENAME = "rename the class, or set its attribute `name`"


def _rules_of(plugin: Plugin, targets: Iterable[str]) -> list[tuple[str, Rule]]:
    """The rules of a plugin with their targets; those with a fault are reported and left out."""
    try:
        value = plugin.load()
    except Exception as error:  # the import of another package raises anything
        fault = f"{plugin.value} cannot be imported ({type(error).__name__}: {error})"
        report_fault(plugin, fault, import_fix(error))
        return []
    if not isinstance(value, Mapping):
        report_fault(plugin, f"{plugin.value} is {value!r}", _FORM)
        return []
    found: list[tuple[str, Rule]] = []
    for target, rules in value.items():
        if target not in targets:
            fault = f"there is no target {target!r}; {nearest_names(str(target), sorted(targets))}"
            report_fault(plugin, fault, _FORM, f"its entry {target!r}")
        elif not isinstance(rules, (list, tuple)):
            report_fault(
                plugin, f"the value of {target!r} is {rules!r}, not a list of rules", _FORM, f"its entry {target!r}"
            )
        else:
            for rule in rules:
                if isinstance(rule, Rule):
                    found.append((target, rule))
                elif isinstance(rule, type) and issubclass(rule, Rule):
                    fault, fix = f"it contains the class {rule.__name__}", f"write {rule.__name__}()"
                    report_fault(plugin, fault, fix, rule.__name__)
                else:
                    report_fault(plugin, f"it contains {rule!r}, which is not a Rule", _FORM, repr(rule))
    return found
