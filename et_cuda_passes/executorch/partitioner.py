"""Base classes of our partitioners: ExecuTorch's hook runs a pass list before the decomposition."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.constants import tensor_identity
from et_cuda_passes.graph.names import without_numbers
from et_cuda_passes.graph.report import Report
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.rewrite import check_expectations, check_expected, constant_pool, parse_passes, rewrite
from et_cuda_passes.targets import Target, default_passes

if TYPE_CHECKING:
    from et_cuda_passes.packed_cache import PackedCache


class RewritingPartitioner(Partitioner):  # type: ignore[misc]  # ExecuTorch ships no types
    """A mixin before a stock partitioner, which rewrites each method on the host when ExecuTorch calls the hook.

    A subclass sets ``rewrite_target``::

        class NpuPartitioner(RewritingPartitioner, StockNpuPartitioner):
            rewrite_target = npu

    One partitioner may lower several methods: a weight that they share is packed once, under one FQN. The report covers
    all lowerings with this partitioner, so use a new one for each lowering.

    Args:
        *args: as for the stock partitioner.
        passes: see :func:`et_cuda_passes.rewrite`; None for the target's default passes.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        stream, cache, device: see :func:`et_cuda_passes.rewrite`. With ``stream`` the programs that are lowered are
            given up.
        **kwargs: as for the stock partitioner.
    """

    rewrite_target: str | Target
    """The target of the rewrites."""
    _always: tuple[Rule, ...] = ()
    """Rules that run after the caller's list, unless the list has a rule of the same name."""

    began: Callable[[str], None] | None = None
    """Called with "decomposing" and "partitioning" as ExecuTorch begins these with a method."""

    _gpu: str | None = None
    _computes_only_outcomes: str = ""
    """The name of a backend that would compute something else, or fail later, for a weight that a rewrite missed."""

    def __init__(
        self,
        *args: Any,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        stream: str | Path | None = None,
        cache: "str | Path | PackedCache | None" = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._passes = default_passes(self.rewrite_target) if passes is None else list(passes)
        names = {getattr(entry, "name", "") for entry in self._passes}
        self._passes += [rule for rule in self._always if rule.name not in names]
        # An invalid pass list or expectation is an error here, not minutes into a lowering.
        check_expected(expect, [entry.name for entry in parse_passes(self._passes)])
        self._expect = expect
        self._pool = constant_pool(stream, cache, device)
        self.reports: list[Report] = []

    @property
    def report(self) -> Report:
        """The outcomes of all readers of a quantized weight, in all methods lowered with this partitioner.

        A second lowering with the same partitioner adds its outcomes to those of the first.

        Raises:
            RuntimeError: nothing was lowered with this partitioner yet.
        """
        if not self.reports:
            raise RuntimeError("no report yet: give this partitioner to to_edge_transform_and_lower first")
        return Report.merge(self.reports)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """ExecuTorch's hook: returns the rewritten program and leaves the original unchanged.

        Raises:
            ExpectationError: the counts are not those expected.
            ValueError: a quantized weight would reach the backend in a form that it cannot compute.
        """
        if self.began is not None:
            self.began("decomposing")
        exported_program = super().transform_for_pre_decomposition(exported_program)
        program, report = rewrite(exported_program, self.rewrite_target, self._passes, pool=self._pool, gpu=self._gpu)
        self.reports.append(report)
        check_expectations(self._expect, report)
        if self._computes_only_outcomes:
            _refuse_misses(self._computes_only_outcomes, report)
            _copy_views(program)
        return program

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        if self.began is not None:
            self.began("partitioning")
        return super().partition(exported_program)


def _copy_views(program: ExportedProgram) -> None:
    """Replace each constant that is a view into a larger tensor by a copy, in place.

    The delegates of executorch 1.5.1 write a constant from the start of its storage, and report no error. A buffer that
    the program writes shares its memory with its views, so these stay.
    """
    tables = (program.state_dict, program.constants)
    written = {
        table[fqn].untyped_storage().data_ptr()
        for fqn in program.graph_signature.buffers_to_mutate.values()
        for table in tables
        if fqn in table
    }
    copies: dict[Hashable, torch.Tensor] = {}  # constants of one tensor get one copy
    for table in tables:
        for name, each in table.items():
            if not isinstance(each, torch.Tensor):  # a script object
                continue
            if is_traceable_wrapper_subclass(each) or isinstance(each, FakeTensor):
                continue
            storage = each.untyped_storage()
            whole = each.storage_offset() == 0 and storage.nbytes() == each.numel() * each.element_size()
            if not whole and storage.data_ptr() not in written:
                key = tensor_identity(each)
                copy = copies[key] = copies[key] if key in copies else each.detach().clone()
                is_parameter = isinstance(each, torch.nn.Parameter)
                table[name] = torch.nn.Parameter(copy, each.requires_grad) if is_parameter else copy


def _refuse_misses(backend: str, report: Report) -> None:
    if report.warnings:
        raise ValueError("; ".join(report.warnings))
    # Weights with similar reasons share the text of the first.
    missed: dict[str, tuple[str, list[str]]] = {}
    for outcome in report.outcomes:
        if outcome.status == "missed":
            why = f"({outcome.op}): {', '.join(map(str, outcome.reasons))}"
            missed.setdefault(without_numbers(why), (why, []))[1].append(outcome.fqn)
    if missed:
        listed = "; ".join(
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} {why}"
            for why, names in missed.values()
        )
        raise ValueError(f"{backend} cannot compute these quantized weights correctly: {listed}")


class AotiRewritingPartitioner(RewritingPartitioner):
    """A mixin before a stock partitioner of an AOTInductor backend, whose only argument is ``compile_spec``.

    Args:
        compile_spec: as for the stock partitioner. If ``method_name`` is missing, it is added: the backends need it for
            their error messages.
        passes: see :func:`et_cuda_passes.rewrite`; None for the target's default passes.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **options: ``stream``, ``cache`` and ``device`` of :class:`RewritingPartitioner`.
    """

    def __init__(
        self,
        compile_spec: list[CompileSpec] | None = None,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        specs = list(compile_spec or [])
        if all(spec.key != "method_name" for spec in specs):
            specs.append(CompileSpec("method_name", b"forward"))
        super().__init__(specs, passes=passes, expect=expect, **options)
