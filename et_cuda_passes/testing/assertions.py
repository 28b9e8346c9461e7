"""Assertions on a rewrite: that it is right, that a rule misses and says why, and that a text has not changed."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from et_cuda_passes.graph.operators import op_name
from et_cuda_passes.graph.report import ExpectationError, Report
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.targets import Target

RTOL = 2.0**-7
"""Relative error of a result by default: one unit in the last place of bf16, the precision of scale and zero."""


def assert_rewrites(
    exported_program: ExportedProgram,
    target: str | Target = "cuda",
    passes: Iterable[Any] | None = None,
    expect: Mapping[str, int] | None = None,
    inputs: tuple[Any, ...] | None = None,
    rtol: float = RTOL,
) -> tuple[ExportedProgram, Report]:
    """Rewrite, and look at everything that a rewrite promises.

    The counts are those expected; the program given is unchanged (graph, signature, every tensor and its bytes); the
    outputs, with the buffers and the inputs that the program writes, equal the original's; and a second rewrite changes
    nothing.

    The numbers are those of one set of inputs. Where the program's shapes are dynamic, ask a second time with
    ``inputs=`` of another length than the example's: what was fixed by mistake holds for that one alone.

    Args:
        exported_program: the program before.
        target: one of ``ecp.targets()``, or a target.
        passes: the pass list; None for the target's own.
        expect: counts by rule name or status, as for ``ecp.rewrite``; None demands that something is rewritten.
        inputs: positional inputs to run both programs on; None for the example inputs of the export.
        rtol: largest ``||got - wanted|| / ||wanted||`` of each floating-point output; the others must be equal.

    Returns:
        The rewritten program and its report, for further assertions.

    Raises:
        AssertionError: one of these does not hold; the message says which, and has the report.
        TypeError: ``inputs`` is no tuple.
        ValueError: there are no inputs to run on.
    """
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise TypeError(f"inputs are the positional inputs as a tuple, (x,), and no {type(inputs).__name__}")
    listed = None if passes is None else list(passes)
    before = _Snapshot.of(exported_program)
    try:
        program, report = rewrite(exported_program, target, listed, expect)
    except ExpectationError as error:
        raise AssertionError(f"the counts are not those expected: {error}") from None
    _same_snapshot(before, _Snapshot.of(exported_program), "the rewrite changed the program that it was given")
    if expect is None:
        assert report.counts()["rewritten"] or any(report.applied.values()), f"nothing was rewritten\n{report}"
    args, kwargs = _inputs_for(exported_program, inputs)
    _compare(_run(program, args, kwargs), _run(exported_program, args, kwargs), rtol, report)
    first = _Snapshot.of(program)
    again, _ = rewrite(program, target, listed)
    _same_snapshot(first, _Snapshot.of(again), f"a second rewrite changed the program again\n{report}")
    return program, report


def assert_misses(
    exported_program: ExportedProgram,
    reason: str,
    target: str | Target = "cuda",
    rule: str | None = None,
    passes: Iterable[Any] | None = None,
) -> Report:
    """Rewrite, and check that a rule did not act at some place for a reason that says ``reason``.

    The place is a candidate that is missed, and whose operator must stand in the result as before. With ``rule`` it may
    also be one of the other places in ``report.rejected``: a candidate that another rule rewrote or kept, or an
    operator that is no candidate.

    Args:
        exported_program: the program before.
        reason: a part of the reason's text ("wanted ..., found ...; hint").
        target: one of ``ecp.targets()``, or a target.
        rule: name of the rule that must give the reason; None for any.
        passes: the pass list; None for the target's own.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: there is no such reason; the message has the report.
        ValueError: ``reason`` is empty, or ``rule`` is not in the pass list.
    """
    if not reason:
        raise ValueError("an empty reason is part of every text; give some words of the reason that is expected")
    before = _Snapshot.of(exported_program)
    program, report = rewrite(exported_program, target, passes)
    _same_snapshot(before, _Snapshot.of(exported_program), "the rewrite changed the program that it was given")
    if rule is not None and rule not in report.passes:
        raise ValueError(f"no pass is named {rule!r}; the pass list is {', '.join(report.passes)}")
    missed = [outcome for outcome in report.outcomes if outcome.status == "missed"]
    found = [
        outcome
        for outcome in missed
        if any(reason in str(given) and rule in (None, given.rule) for given in outcome.reasons)
    ]
    rejected = report.rejected.get(rule, []) if rule else []
    if not found and any(reason in text for text in rejected):
        return report
    by = f" by {rule}" if rule else ""
    others = "".join(f"\n  rejected  {text}" for text in rejected)
    assert found, f"no candidate is missed{by} with a reason that says {reason!r}\n{report}{others}"
    was, now = _nodes(exported_program), _nodes(program)
    # An operator that a rule built has a note that says so.
    unchanged = (each for each in found if all(given.stage != "note" for given in each.reasons))
    for name in (outcome.node for outcome in unchanged):
        assert now.get(name) == was[name], f"{name} is reported as missed, yet it changed\n{report}"
    return report


def as_text(program: ExportedProgram) -> str:
    """A line for each node of a program: what it calls on what, and the dtype and shape of its value.

    The symbols of dynamic sizes are written as ``s``, since torch chooses their numbers.
    """

    def show(node: torch.fx.Node) -> str:
        value = node.meta.get("val")
        shape = ""
        if isinstance(value, torch.Tensor):
            shape = f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if node.op == "placeholder":
            return f"{node.name}{shape}"
        arguments = ", ".join([*map(str, node.args), *(f"{key}={arg}" for key, arg in node.kwargs.items())])
        called = op_name(node.target) if node.op == "call_function" else node.op
        return f"{node.name} = {called}({arguments}){shape}"

    return re.sub(r"\bs\d+\b", "s", "\n".join(map(show, program.graph.nodes)))


UPDATE = "ETCP_UPDATE_GOLDEN"
"""The environment variable that is 1 to write golden files instead of comparing with them."""


def assert_golden(before: ExportedProgram, after: ExportedProgram, report: Report, golden: str | Path) -> None:
    """Compare a program before and after its rewrite, and the report, with a text that is kept.

    The text has three parts, "before", "after" and "report", the programs as :func:`as_text` writes them. Folders of
    source files are left out.

    Args:
        before: the program that was rewritten.
        after: the program that the rewrite returned.
        report: its report.
        golden: a ``str`` is the text itself; a ``pathlib.Path`` is the file with it, which is written with
            ``ETCP_UPDATE_GOLDEN=1``. Read the difference before you commit it.

    Raises:
        AssertionError: the text differs, with the difference; or the file does not exist.
    """
    text = f"before\n\n{as_text(before)}\n\nafter\n\n{as_text(after)}\n\nreport\n\n{report}\n"
    text = re.sub(r"\bat \S*[/\\]([^/\\\s]+:\d+: )", r"at \1", text)
    if isinstance(golden, Path):
        if os.environ.get(UPDATE) == "1":
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text, encoding="utf-8")
            return
        assert golden.exists(), f"{golden} does not exist: run the test with {UPDATE}=1, which writes it"
        wanted, name = golden.read_text(encoding="utf-8"), str(golden)
        fix = f"; if the new text is right, run the test with {UPDATE}=1"
    else:
        wanted, name, fix = inspect.cleandoc(golden) + "\n", "the golden text", ""
    changed = "\n".join(difflib.unified_diff(wanted.splitlines(), text.splitlines(), name, "now", n=2, lineterm=""))
    assert text == wanted, f"the text differs from {name}{fix}\n{changed}"


@dataclass(frozen=True)
class _Snapshot:
    """A program as text, with the guards and ranges of its sizes, and each constant with a copy of its bytes."""

    text: str
    tensors: dict[str, tuple[torch.Tensor, list[torch.Tensor]]]

    @staticmethod
    def of(program: ExportedProgram) -> "_Snapshot":
        graphs = _graphs(program)
        text = "\n".join([*map(str, graphs), str(program.graph_signature), *_sizes(program, graphs)])
        constants = {**program.constants, **program.state_dict}
        tensors = {name: value for name, value in constants.items() if isinstance(value, torch.Tensor)}
        return _Snapshot(text, {name: (tensor, _bytes(tensor)) for name, tensor in tensors.items()})


def _graphs(program: ExportedProgram) -> list[torch.fx.Graph]:
    """The program's graph and those of its branches."""
    return [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]


def _sizes(program: ExportedProgram, graphs: list[torch.fx.Graph]) -> list[str]:
    """The ranges and guards of dynamic sizes, in the program and in the shape environments of its values."""
    values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
    modes = dict.fromkeys(value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor))
    lines = [f"range of {symbol}: {bounds}" for symbol, bounds in program.range_constraints.items()]
    for shapes in dict.fromkeys(mode.shape_env for mode in modes if mode.shape_env is not None):
        lines += [f"guard {guard.expr}" for guard in shapes.guards]
        lines += [f"range of {symbol} at export: {bounds}" for symbol, bounds in shapes.var_to_range.items()]
        lines += [f"{symbol} is {expression}" for symbol, expression in shapes.replacements.items()]
    return lines


def _nodes(program: ExportedProgram) -> dict[str, Any]:
    """The target of each node by its name in reports; in a branch that name is a path."""
    modules = program.graph_module.named_modules()
    graphs = {path: module.graph for path, module in modules if isinstance(module, torch.fx.GraphModule)}
    return {".".join(filter(None, (path, n.name))): n.target for path, graph in graphs.items() for n in graph.nodes}


def _bytes(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Copies of the bytes of ``tensor``, of a subclass part by part; none for what holds no data."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return [part for name in flatten()[0] for part in _bytes(getattr(tensor, name))]
    if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
        return []
    return [tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)]


def _same_snapshot(wanted: _Snapshot, got: _Snapshot, complaint: str) -> None:
    texts = (wanted.text.splitlines(), got.text.splitlines())
    changed = "\n".join(difflib.unified_diff(*texts, "before", "after", n=1, lineterm=""))
    assert got.text == wanted.text, f"{complaint}\n{changed}"
    assert list(got.tensors) == list(wanted.tensors), (
        f"{complaint}: its constants were {list(wanted.tensors)} and are {list(got.tensors)}"
    )
    for name, (tensor, data) in wanted.tensors.items():
        now, now_data = got.tensors[name]
        assert now is tensor, f"{complaint}: constant {name} is another object"
        assert all(map(torch.equal, data, now_data)), f"{complaint}: constant {name} holds other bytes"


def _inputs_for(program: ExportedProgram, inputs: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is not None:
        return tuple(inputs), {}
    if program.example_inputs is None:
        raise ValueError("the program carries no example inputs; give inputs=")
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def _run(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Outputs, and buffers and inputs afterwards, by a name for messages. A copy is run, on copies of the inputs."""
    module = copy.deepcopy(program.module())
    args, kwargs = copy.deepcopy((args, kwargs))
    before = {name: _bytes(buffer) for name, buffer in module.named_buffers()}
    with torch.no_grad():
        try:
            result = module(*args, **kwargs)
        except NotImplementedError as error:
            raise AssertionError(_without_kernel(program, error)) from error
    leaves, shape = pytree.tree_flatten(result)
    found: dict[str, Any] = {"the structure of the outputs": shape}
    found |= {f"output {i}": leaf for i, leaf in enumerate(leaves)}
    for name, buffer in module.named_buffers():
        unchanged = all(map(torch.equal, before[name], _bytes(buffer)))
        found[f"buffer {name}" if unchanged else f"buffer {name}, which the program writes"] = buffer
    found |= {f"input {i} after the call": leaf for i, leaf in enumerate(pytree.tree_leaves((args, kwargs)))}
    return found


def _without_kernel(program: ExportedProgram, error: NotImplementedError) -> str:
    """The message for a program that calls an operator without an implementation for the CPU."""
    operators = {
        str(node.target.name())
        for graph in _graphs(program)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    named = sorted(name for name in operators if f"'{name}'" in str(error))
    if not named:
        return f"the program cannot be run: {error}"
    return (
        f"the operator {named[0]} has no implementation for the CPU, on which the numbers are compared: register a "
        f"reference in plain torch, @torch.library.impl({named[0]!r}, 'CPU') above a function of its arguments, or "
        "write the operator with torch.library.custom_op"
    )


def assert_same_results(
    program: ExportedProgram, wanted: ExportedProgram, inputs: tuple[Any, ...], rtol: float = RTOL, report: object = ""
) -> None:
    """Run both programs, and look that outputs, and buffers and inputs afterwards, are the same.

    Args:
        program: the rewritten program.
        wanted: the program before.
        inputs: positional inputs; copies of them are run.
        rtol: as for :func:`assert_rewrites`.
        report: what a message ends with.

    Raises:
        AssertionError: something differs; the message names it.
    """
    _compare(_run(program, tuple(inputs), {}), _run(wanted, tuple(inputs), {}), rtol, report)


def _compare(got: dict[str, Any], wanted: dict[str, Any], rtol: float, report: object) -> None:
    for name, value in wanted.items():
        if name not in got:
            # A weight that was packed. A missing output is found by the structure, which comes first.
            assert not name.endswith("writes"), f"{name}, is not written\n{report}"
            continue
        ours = got[name]
        if not isinstance(value, torch.Tensor):
            assert ours == value, f"{name} is {ours!r}, was {value!r}\n{report}"
            continue
        form, wanted_form = (ours.dtype, tuple(ours.shape)), (value.dtype, tuple(value.shape))
        assert form == wanted_form, f"{name} is of {form}, was of {wanted_form}\n{report}"
        if not value.dtype.is_floating_point:
            assert torch.equal(ours, value), f"{name} holds other values\n{report}"
            continue
        norm = float(value.double().norm())
        error = float((ours.double() - value.double()).norm())
        # So written, a NaN on either side fails.
        assert error <= rtol * norm, f"{name} is off by {error:.3g} of {norm:.3g}, more than rtol={rtol:.3g}\n{report}"
