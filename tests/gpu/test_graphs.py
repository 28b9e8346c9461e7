"""Methods that run as CUDA graphs: the same results as without, with state, other addresses, streams and refusals."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.delegate import DelegateError, Program, load
from et_cuda_passes.delegate.graphs import MAX_GRAPHS, GraphMethod
from tests.gpu.lowered import lower, quantized, save

pytestmark = pytest.mark.gpu
FEATURES, HIDDEN = 256, 512


def lower_stock(programs: object, folder: Path) -> Path:
    with torch.no_grad():
        return save(to_edge_transform_and_lower(programs, partitioner=[ecp.CudaPartitioner([])]), folder)


@pytest.fixture(scope="module")
def linears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`prefill` of 1 to 64 rows and `decode` of one."""
    model = quantized(FEATURES, HIDDEN)
    rows = ({0: Dim("rows", min=1, max=64)},)
    prefill = torch.export.export(model, (torch.randn(7, FEATURES).bfloat16(),), dynamic_shapes=rows)
    decode = torch.export.export(model, (torch.randn(1, FEATURES).bfloat16(),))
    return lower({"prefill": prefill, "decode": decode}, tmp_path_factory.mktemp("linears"))[0]


def test_graph_computes_the_same_bits_for_inputs_at_any_address(linears: Path) -> None:
    program = Program(linears)
    plain, graph = program.method("decode"), program.method("decode", cuda_graph=True)
    assert isinstance(graph, GraphMethod) and program.method("decode", cuda_graph=True) is graph
    kept = []
    for _ in range(5):
        x = torch.randn(1, FEATURES, device="cuda", dtype=torch.bfloat16)
        (wanted,), (found,) = plain(x), graph(x)
        assert torch.equal(found, wanted)
        kept.append((found, wanted))
    assert len(graph._graphs) == 1
    # A later call does not change earlier outputs, or its input.
    assert all(torch.equal(found, wanted) for found, wanted in kept)
    odd = torch.empty(FEATURES + 1, dtype=torch.bfloat16, device="cuda")[1:].view(1, FEATURES).copy_(x)
    wide = torch.empty(1, 2 * FEATURES, dtype=torch.bfloat16, device="cuda")[:, ::2].copy_(x)
    for given in (x.cpu(), odd, wide):
        assert torch.equal(graph(given)[0], wanted)
    with pytest.raises(DelegateError, match="input 0 has shape"):
        graph(torch.randn(2, FEATURES, device="cuda").bfloat16())


def test_weights_of_a_graph_are_on_the_gpu_once(linears: Path) -> None:
    program = Program(linears)
    plain, graph = program.method("prefill"), program.method("decode", cuda_graph=True)
    assert {fqn: weight.data_ptr() for fqn, weight in plain.weights.items()} == {
        fqn: weight.data_ptr() for fqn, weight in graph.weights.items()
    }


def test_dynamic_method_is_refused(linears: Path) -> None:
    with pytest.raises(DelegateError, match="has a dynamic size, and a graph has fixed ones"):
        load(linears, method="prefill", cuda_graph=True)


def test_calls_on_other_streams_and_in_inference_mode_agree(linears: Path) -> None:
    plain, graph = load(linears, method="decode"), load(linears, method="decode", cuda_graph=True)
    side = torch.cuda.Stream()
    for number in range(8):
        x = torch.randn(1, FEATURES, device="cuda", dtype=torch.bfloat16)
        (wanted,) = plain(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
            if number % 3:
                (found,) = graph(x)
            else:
                with torch.inference_mode():
                    (found,) = graph(x)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted), number


class Sum(nn.Module):
    """A module that adds its inputs to a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


def test_state_advances_once_a_call_and_is_shared_with_other_methods(tmp_path: Path) -> None:
    model = Sum()
    programs = {name: torch.export.export(model, (torch.ones(4, 32),)) for name in ("prefill", "decode")}
    program = Program(lower_stock(programs, tmp_path))
    prefill, decode = program.method("prefill"), program.method("decode", cuda_graph=True)
    x = torch.randn(4, 32, device="cuda")
    kept = []
    for step, method in enumerate((prefill, decode, decode, decode, prefill, decode), 1):
        (found,) = method(x)
        assert torch.allclose(found, 2 * step * x, rtol=1e-5), step
        kept.append(found)
    assert all(torch.allclose(found, 2 * step * x, rtol=1e-5) for step, found in enumerate(kept, 1))


class Cache(nn.Module):
    """A linear, and a cache that is an input: row `position` of it becomes the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(0, position, self.linear(x))
        return cache.cumsum(0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = (torch.randn(1, 32), torch.tensor([0]), torch.zeros(8, 32))
    return lower_stock(torch.export.export(Cache(), given), tmp_path_factory.mktemp("cache"))


def test_cache_that_is_an_input_is_written_in_place_at_each_address(cache: Path) -> None:
    plain, graph = load(cache), load(cache, cuda_graph=True)
    assert plain.mutated == graph.mutated == (2,)
    # Two sequences in turn, each with its own cache: one graph for each.
    wanted, found = ([torch.zeros(8, 32, device="cuda") for _ in range(2)] for _ in range(2))
    for step in range(6):
        which, position = step % 2, torch.tensor([step // 2], device="cuda")
        x = torch.randn(1, 32, device="cuda")
        expected, given = plain(x, position, wanted[which]), graph(x, position, found[which])
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), step
        assert torch.equal(found[which], wanted[which]) and found[which].any()
    assert isinstance(graph, GraphMethod) and len(graph._graphs) == 2


def test_number_of_graphs_is_bounded(cache: Path) -> None:
    plain, graph = load(cache), load(cache, cuda_graph=True)
    x, position = torch.randn(1, 32, device="cuda"), torch.tensor([3], device="cuda")
    caches = [torch.zeros(8, 32, device="cuda") for _ in range(MAX_GRAPHS + 3)]
    wanted = plain(x, position, torch.zeros(8, 32, device="cuda"))[-1]
    for _ in range(2):
        for each in caches:
            assert torch.equal(graph(x, position, each)[-1], wanted)
    assert isinstance(graph, GraphMethod) and len(graph._graphs) == MAX_GRAPHS


def test_cache_on_the_cpu_is_copied_there_and_back(cache: Path) -> None:
    plain, graph = load(cache), load(cache, cuda_graph=True)
    wanted, found = torch.zeros(8, 32), torch.zeros(8, 32)
    kept = []
    for step in range(4):
        x, position = torch.randn(1, 32), torch.tensor([step])
        expected, given = plain(x, position, wanted), graph(x, position, found)
        assert torch.equal(found, wanted)
        kept += zip(given, expected, strict=True)
    assert all(torch.equal(a, b) for a, b in kept), "a later call changed an output"


def test_inputs_that_overlap_are_refused_by_a_graph_too(cache: Path) -> None:
    graph, shared = load(cache, cuda_graph=True), torch.zeros(8, 32, device="cuda")
    for _ in range(3):
        with pytest.raises(DelegateError, match="input 2, which the program writes to, shares memory with input 0"):
            graph(shared[:1], torch.tensor([0], device="cuda"), shared)


class Condition(nn.Module):
    """A branch that the host chooses by a value of the GPU.

    The branches contain no number: ExecuTorch 1.5.1 turns it into a tensor, which Inductor cannot compile in a branch.
    """

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.neg(), (x,))
        return result


def test_method_that_waits_for_the_gpu_is_refused_and_still_runs_without_a_graph(tmp_path: Path) -> None:
    path = lower_stock(torch.export.export(Condition(), (torch.ones(4, 32),)), tmp_path)
    graph, x = load(path, cuda_graph=True), torch.randn(4, 32, device="cuda")
    wanted = Condition()(x)
    torch.testing.assert_close(graph(x)[0], wanted)  # the first call has no graph
    with pytest.raises(DelegateError, match="cannot be captured in a CUDA graph: .*load it without cuda_graph=True"):
        graph(x)
    torch.cuda.synchronize()
    torch.testing.assert_close(load(path)(x)[0], wanted)


def test_random_numbers_go_on_after_a_capture_that_fails(tmp_path: Path) -> None:
    path = lower_stock(torch.export.export(Condition(), (torch.ones(4, 32),)), tmp_path)
    graph, x = load(path, cuda_graph=True), torch.ones(4, 32, device="cuda")
    graph(x)
    torch.cuda.manual_seed(5)
    wanted = [torch.randn(7, device="cuda") for _ in range(2)]
    torch.cuda.manual_seed(5)
    found = [torch.randn(7, device="cuda")]
    with pytest.raises(DelegateError, match="cannot be captured"):
        graph(x)
    found.append(torch.randn(7, device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
