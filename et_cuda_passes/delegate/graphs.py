"""Methods that run as CUDA graphs: one launch for all kernels of a call."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.delegate.files import DelegateError
from et_cuda_passes.delegate.library import Library
from et_cuda_passes.delegate.method import Method, check_inputs, in_dim_order, storage_ptr, to_device_layout
from et_cuda_passes.delegate.plan import Dynamism, Kernel, Plan

MAX_GRAPHS = 8
"""The largest number of graphs of a method: one for each set of addresses of the inputs that it writes to."""
# Their results, or the sizes of these, are values of the GPU that the host reads.
_HOST_READS = (
    "aten::_local_scalar_dense",
    "aten::masked_select.out",
    "aten::nonzero.out",
    "aten::repeat_interleave.Tensor_out",
)
_INSTEAD = "load it without cuda_graph=True"


def capture_problem(plan: Plan, device: torch.device) -> str | None:
    """Why a method cannot be captured in a CUDA graph, and what to do; None if nothing in its plan prevents it."""
    if device.type != "cuda":
        return f"it runs on {device}, and a CUDA graph needs a CUDA device: {_INSTEAD}"
    for position, index in enumerate(plan.inputs):
        tensor = plan.values[index].tensor
        if tensor is not None and tensor.dynamism != Dynamism.STATIC:
            return (
                f"input {position}, {tensor}, has a dynamic size, and a graph has fixed ones: export the method with "
                f"static sizes, such as one token, or {_INSTEAD}"
            )
    for step in plan.steps:
        if isinstance(step, Kernel) and step.name in _HOST_READS:
            return f"the host reads the result of {step.name}, which a graph does not wait for: {_INSTEAD}"
    for value in plan.values:
        if value.tensor is not None and value.tensor.dynamism != Dynamism.STATIC:
            return f"an intermediate result, {value.tensor}, has a dynamic size: {_INSTEAD}"
    return None


@dataclass(frozen=True)
class _Alias:
    """An output in the memory of the mutated input at ``position``; ``offset`` counts from the input's own."""

    position: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Captured:
    """A graph with its own inputs by position, and its outputs: tensors in the graph's memory, aliases or constants."""

    graph: torch.cuda.CUDAGraph
    buffers: Mapping[int, Tensor]
    outputs: tuple[Any, ...]


class GraphMethod(Method):
    """A method that captures its kernels in a CUDA graph, and replays the graph in later calls.

    It is called like a :class:`~et_cuda_passes.delegate.method.Method`, and returns the same. The first call runs
    kernel by kernel, which loads the kernels. The next call captures a graph, which executes nothing, and replays it.

    An input that is only read is copied into the graph's own input, so that it may be another tensor in each call. An
    input that the method writes to, such as a KV cache, is written in place: the graph has its address. A call with a
    tensor at another address captures another graph; there are at most ``MAX_GRAPHS``, and the oldest is dropped. If
    such an input is not on the device, or not in the method's layout, it is copied to the graph and back.

    Outputs are copied out of the graph, so that a later call does not change them. The exception is an output that is
    an input which the method writes to: it is the caller's tensor, as without a graph.

    Several threads may call the method; calls run one after another, also those on different CUDA streams.
    """

    def __init__(
        self,
        plan: Plan,
        libraries: Mapping[int, Library],
        weights: Mapping[str, Tensor],
        stored: Mapping[int, Tensor],
        device: torch.device,
        where: str,
    ) -> None:
        super().__init__(plan, libraries, weights, stored, device, where)
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._lock = Lock()
        self._has_run = False
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the method; see :meth:`Method.__call__`.

        Raises:
            DelegateError: as for a method; or the method cannot be captured. Nothing was executed then.
        """
        check_inputs(self._plan, inputs, self._where)
        self._check_mutated(inputs)
        with self._lock, torch.no_grad(), torch.cuda.device(self.device):
            self._wait_for_other_stream()
            if not self._has_run:
                outputs = super().__call__(*inputs)
                self._has_run = True
                return outputs
            in_place = self._in_place(inputs)
            key = tuple(in_place[position].data_ptr() if position in in_place else -1 for position in self.mutated)
            captured = self._graphs.get(key)
            if captured is None:
                captured = self._capture(in_place)
                if len(self._graphs) == MAX_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = captured
            for position, buffer in captured.buffers.items():
                buffer.copy_(inputs[position])
            captured.graph.replay()
            for position in self.mutated:
                if position in captured.buffers:
                    inputs[position].copy_(captured.buffers[position])
            return [_copied(output, in_place) for output in captured.outputs]

    def _wait_for_other_stream(self) -> None:
        """Make the current stream wait for the last call, if that was on another stream: both use the same memory."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _in_place(self, inputs: tuple[Any, ...]) -> dict[int, Tensor]:
        """The mutated inputs that the method can write to where they are, by position."""
        found = {}
        for position in self.mutated:
            spec = self.inputs[position].tensor
            assert spec is not None
            tensor = to_device_layout(inputs[position], spec, self.device)
            if storage_ptr(tensor) == storage_ptr(inputs[position]):
                found[position] = tensor
        return found

    def _capture(self, in_place: Mapping[int, Tensor]) -> _Captured:
        values, buffers = dict(self._values), {}
        # A tensor that is created in inference mode could not be filled outside of it.
        with torch.inference_mode(False):
            for position, (index, value) in enumerate(zip(self._plan.inputs, self.inputs, strict=True)):
                if value.tensor is None:
                    values[index] = value.constant
                elif position in in_place:
                    values[index] = in_place[position]
                else:
                    spec = value.tensor
                    empty = torch.empty(spec.sizes, dtype=spec.dtype, device=self.device)
                    buffers[position] = values[index] = in_dim_order(empty, spec)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream even if the inner one fails to end the capture.
            with (
                _random_numbers_kept(),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                outputs = self._run(values)
        except torch.OutOfMemoryError:
            raise
        except (DelegateError, RuntimeError) as error:
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            raise DelegateError(
                f"{self._where} cannot be captured in a CUDA graph: {reason}. A method cannot if its host code waits "
                f"for a value of the GPU, as for a condition: {_INSTEAD}"
            ) from error
        return _Captured(graph, buffers, tuple(_alias_or_output(output, in_place) for output in outputs))


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give the current device's random numbers back after a capture that fails.

    torch (2.11) does not end the generator's part of such a capture. The next random number would be an error.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(state)
        raise


def _alias_or_output(output: Any, in_place: Mapping[int, Tensor]) -> Any:
    if isinstance(output, Tensor) and output.numel():
        for position, tensor in in_place.items():
            if tensor.numel() and storage_ptr(output) == storage_ptr(tensor):
                # The graph must not keep the caller's tensor alive.
                offset = int(output.storage_offset()) - int(tensor.storage_offset())
                return _Alias(position, tuple(output.shape), output.stride(), offset)
    return output


def _copied(output: Any, in_place: Mapping[int, Tensor]) -> Any:
    if isinstance(output, _Alias):
        tensor = in_place[output.position]
        return tensor.as_strided(output.sizes, output.strides, tensor.storage_offset() + output.offset)
    return output.clone() if isinstance(output, Tensor) else output
