"""What nothing reads any more is removed: operators, constants, and the operands of control flow."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch.fx import Node

from et_cuda_passes.graph.memory import has_effect

if TYPE_CHECKING:
    from et_cuda_passes.graph.program import Program


def sweep(program: "Program", abandoned: Iterable[Node]) -> Iterator[Node]:
    """Erase ``abandoned`` nodes, and then their inputs, as long as nothing reads them; yields each that is gone.

    A node with an effect (:func:`~et_cuda_passes.graph.memory.has_effect`) stays, whether its result is read or not,
    unless a rule replaced it: then the replacement has that effect. Linear in what is removed.
    """
    branches = program.branches
    work = [*branches.settle(), *abandoned]
    gone: set[Node] = set()
    while work := work or branches.settle():
        node = work.pop()
        if node in gone or node.users:
            continue
        if branches.is_input(node):
            branches.unread(node)
            continue
        if node in program.at_boundaries and program.current(node) is node:
            continue  # a preserved module's signature names it
        if node.op == "placeholder":
            if program.target(node) is None or program.is_output(node):
                continue
            program.drop(node)
        elif node.op != "call_function" or (program.current(node) is node and has_effect(node, branches.bodies)):
            continue
        gone.add(node)
        work.extend(node.all_input_nodes)
        node.graph.erase_node(node)
        yield node
