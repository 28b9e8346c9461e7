"""``match``: how far the pattern of a rule fits, and which of its requirements hold."""

import re
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from et_cuda_passes.cli.console import Steps, UsageError, handle_errors, one_line, print_json
from et_cuda_passes.cli.documents import Failed, MatchDocument, Place
from et_cuda_passes.cli.options import Debug, Json, ModelPath, TargetWithDefault, Trust, complete_rules

if TYPE_CHECKING:
    from et_cuda_passes.attempts import Attempt
    from et_cuda_passes.graph.report import Reason


def match(
    rule: Annotated[
        str,
        typer.Argument(
            metavar="RULE",
            help="A rule of the target's list, or MODULE:NAME, a rule of your own package.",
            autocompletion=complete_rules,
        ),
    ],
    model: ModelPath,
    target: TargetWithDefault = "cuda",
    at: Annotated[
        str | None, typer.Option(metavar="NODE", help="Only the places that contain this node.", show_default=False)
    ] = None,
    nearest: Annotated[int, typer.Option(metavar="N", min=1, help="The number of places that are printed.")] = 3,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print how far the pattern of RULE fits at the nearest places of MODEL, and which requirements hold.

    The pattern is a tree. A part that fits has the mark ✓, the part at which the attempt stopped ✗, and a part that was
    not reached ·. The passes before RULE in the list of the target have run.
    """
    with handle_errors(debug):
        from et_cuda_passes.attempts import attempts
        from et_cuda_passes.executorch.packed import load_model
        from et_cuda_passes.targets import get_target

        try:
            chosen = get_target(target)
            found_rule = _find_rule(rule, target)
        except ValueError as error:
            raise UsageError(str(error)) from None
        with Steps(2) as step:
            step(f"loading {model}")
            program = load_model(model, target, trust).program
            step(f"matching {found_rule.name} for {target}")
            try:
                found = attempts(program, found_rule, chosen, at=at)
            except ValueError as error:
                raise UsageError(str(error)) from None
        matched = sum(attempt.matches for attempt in found)
        if as_json:
            places = list(map(_place, found[:nearest]))
            print_json(MatchDocument(found_rule.name, target, len(found), matched, places))
            return
        typer.echo(f"{found_rule.name} for {target}: {len(found)} tried, {matched} match")
        if not found:
            typer.echo("no operator fits a call of the pattern:")
            typer.echo(_pattern(found_rule))
        for attempt in found[:nearest]:
            typer.echo(f"\n{attempt}")
        if len(found) > nearest:
            typer.echo(f"\n{len(found) - nearest} more; --nearest prints more of them, --at NODE others")


def _place(attempt: "Attempt") -> Place:
    return Place(
        node=attempt.node,
        op=attempt.op,
        source=attempt.source,
        matches=attempt.matches,
        progress=attempt.progress,
        nodes=sorted(attempt.nodes),
        stopped=None if attempt.reason is None else _failed(attempt.reason),
        failed=list(map(_failed, attempt.failures)),
        tree=list(attempt.tree),
    )


def _failed(reason: "Reason") -> Failed:
    return Failed(reason.requirement, reason.wanted, reason.found, reason.hint)


def _pattern(rule: Any) -> str:
    from et_cuda_passes.graph.rule import compile_rule
    from et_cuda_passes.graph.tree import draw_unmatched

    return "\n".join(f"  {line}" for line in draw_unmatched(compile_rule(rule).pattern))


def _find_rule(name: str, target: str) -> Any:
    """The rule with that name in the target's list, or at the place ``MODULE:NAME``."""
    from et_cuda_passes.graph.passes import nearest_names
    from et_cuda_passes.graph.rule import Rule
    from et_cuda_passes.targets import RENAMED_PASSES, default_passes

    if ":" not in name:
        listed = {each.name: each for each in default_passes(target)}
        if name not in listed:
            nearest = nearest_names(name, listed, RENAMED_PASSES)
            raise UsageError(f"target {target} has no rule {name!r}; {nearest}; MODULE:NAME is one of your own package")
        return listed[name]
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise UsageError(f"RULE {name!r}: write MODULE:NAME, the module, a colon, and the name of the rule in it")
    module, _, attribute = name.partition(":")
    try:
        value = getattr(import_module(module), attribute)
        value = value() if isinstance(value, type) and issubclass(value, Rule) else value
    except Exception as error:  # the import of another package raises anything
        raise UsageError(f"RULE {name} cannot be imported ({one_line(error)}): put its folder on PYTHONPATH") from error
    if not isinstance(value, Rule):
        raise UsageError(f"RULE {name} is {value!r}, not an et_cuda_passes.Rule")
    return value
