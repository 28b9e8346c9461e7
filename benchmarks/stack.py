"""A stack of four blocks x + down(silu(up(x))), 3072 -> 8192 -> 3072, as a .pte: four bits beside sixteen, by rows M.

    python -m benchmarks.stack [--group 32] [--rows 1 2 5 8 12 ...] [--folder DIR] [--jobs 6]

Every variant is lowered in a separate process, ``--jobs`` at once; variants in the folder are not lowered again. Then
each library runs alone: the median time of a call, from the GPU's clock around many calls, and the error of the outputs
against fp64 on the same weights. ``cuBLAS bf16`` is the same stack in eager PyTorch, captured in a CUDA graph so that
launches cost nothing. A variant for one length is also run as a CUDA graph, by ``delegate.load``. The last line is the
fraction of the limit that the Triton kernels reach. The limit is the larger of two times: the bytes of the packed
weights at the speed of a copy, and the operations at that of a large product of cuBLAS.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from benchmarks.limit import Limit

BLOCKS, FEATURES, HIDDEN, LONGEST = 4, 3072, 8192, 4096
ROWS = (1, 2, 5, 8, 12, 24, 48, 96, 160, 333, 600, 777, 1100, 2048, 3500)
CUBLAS = "cuBLAS bf16"


class Variant(NamedTuple):
    """One program.

    Attributes:
        kernel: kernel of our partitioner's int4 linears; None for the stock partitioner.
        hint: length of the example of the export.
        quantized: whether the weights are int4.
        fixed: whether the length is static.
        aoti_packed: whether the weights are ExecuTorch's own ``AotiPackedInt4Tensor``.
    """

    kernel: str | None
    hint: int
    quantized: bool
    fixed: bool = False
    aoti_packed: bool = False


VARIANTS = {
    "bf16, hint 16": Variant(None, 16, quantized=False),
    "bf16, hint 1500": Variant(None, 1500, quantized=False),
    "generic int4": Variant(None, 16, quantized=True),
    "AotiPackedInt4": Variant(None, 16, quantized=True, aoti_packed=True),
    "tinygemm": Variant("tinygemm", 16, quantized=True),
    "triton": Variant("triton", 16, quantized=True),
    "bf16, 1 row": Variant(None, 1, quantized=False, fixed=True),
    # The difference to these is the cost of choosing the kernel at run time.
    "triton, 1 row": Variant("triton", 1, quantized=True, fixed=True),
    "triton, 16 rows": Variant("triton", 16, quantized=True, fixed=True),
}


class Block(nn.Module):
    """x + down(silu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, 3072]."""
        return x + self.down(F.silu(self.up(x)))


def stack() -> nn.Module:
    """The stack in bf16 with the same random weights in every process, on the CPU."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(BLOCKS))).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def quantized(group: int) -> nn.Module:
    """The stack with torchao's generic int4 weights."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = stack()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))
    return model


def export(model: nn.Module, variant: Variant) -> ExportedProgram:
    """One method whose length is dynamic, 1 to 4096, with the hint for tuning kernels; or static."""
    x = torch.randn(variant.hint, FEATURES, dtype=torch.bfloat16)
    dynamic = None if variant.fixed else ({0: Dim("length", min=1, max=LONGEST)},)
    return torch.export.export(model, (x,), dynamic_shapes=dynamic)


def passes(kernel: str) -> list[Any]:
    """The default passes for cuda, with this kernel for linears."""
    import et_cuda_passes as ecp

    return ecp.default_passes("cuda").replace("linear_int4", ecp.LinearInt4(kernel=kernel))


def lower(name: str, group: int, folder: Path) -> None:
    """Write ``<folder>/<name>/model.pte`` and its other files."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as StockCudaPartitioner
    from executorch.exir import to_edge_transform_and_lower

    import et_cuda_passes as ecp

    variant = VARIANTS[name]
    model = quantized(group) if variant.quantized else stack()
    if variant.aoti_packed:
        from executorch.backends.cuda.aoti_packed_int4_tensor import pack_int4_weights_for_aoti

        pack_int4_weights_for_aoti(model)
    program = export(model, variant)
    if variant.kernel is None:
        partitioner = StockCudaPartitioner([CudaBackend.generate_method_name_compile_spec("forward")])
    else:
        partitioner = ecp.CudaPartitioner(
            [], passes=passes(variant.kernel), expect={"linear_int4": 2 * BLOCKS, "missed": 0}
        )
    begin = time.monotonic()
    with torch.no_grad():
        lowered = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch()
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    lowered.write_tensor_data_to_file(str(target))
    (target / "seconds").write_text(f"{time.monotonic() - begin:.1f}")
    lowered.save(str(target / "model.pte"))


def lower_all(names: Sequence[str], group: int, folder: Path, jobs: int) -> None:
    """Lower missing variants, ``jobs`` processes at once; each writes a log beside its files."""
    waiting = [name for name in names if not (folder / name / "model.pte").exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            log = (folder / f"{name}.log").open("wb")
            command = [sys.executable, "-m", "benchmarks.stack", "--lower", name, "--folder", str(folder)]
            running[name] = subprocess.Popen([*command, "--group", str(group)], stdout=log, stderr=log)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode:
                tail = (folder / f"{name}.log").read_text(errors="replace")[-2000:]
                print(f"{name} was not lowered:\n{tail}", file=sys.stderr)
        time.sleep(0.2)


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median over five rounds of ``calls`` calls of the time of one call, on the GPU's clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def captured(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Replays of a CUDA graph of the model."""
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
    return graph.replay


def exact(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The stack in fp64."""
    x = x.double()
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = x + F.silu(x @ up.double().T) @ down.double().T
    return x


def main() -> None:
    """Lower, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--folder", type=Path, default=Path("build/stack"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--lower", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    folder = options.folder / f"group{options.group}"
    if options.lower:
        lower(options.lower, options.group, options.folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lower_all(options.variants, options.group, folder, options.jobs)
    report(folder, options.variants, options.rows, options.group)


def report(folder: Path, names: Sequence[str], rows: Sequence[int], group: int) -> None:
    """Measure every variant that was lowered, and print the tables."""
    from et_cuda_passes.delegate import load

    dense = stack().cuda()
    weights = {False: [p.detach() for p in dense.parameters()]}
    weights[True] = [m.weight.dequantize().cuda() for m in quantized(group).modules() if isinstance(m, nn.Linear)]
    inputs = {m: torch.randn(m, FEATURES, device="cuda", dtype=torch.bfloat16) for m in rows}
    calls = {m: 100 if m <= 256 else 20 for m in rows}
    times: dict[str, dict[int, float]] = {}
    errors: dict[str, float] = {}
    sizes: dict[str, str] = {}
    for name in names:
        if not (folder / name / "model.pte").exists():
            continue
        run, variant = load(folder / name / "model.pte"), VARIANTS[name]
        taken = {m: x for m, x in inputs.items() if not variant.fixed or m == variant.hint}
        times[name] = {m: microseconds(partial(run, x), calls[m]) for m, x in taken.items()}
        wanted = {m: exact(weights[variant.quantized], x) for m, x in taken.items()}
        off = [((run(x)[0].double() - wanted[m]).norm() / wanted[m].norm()).item() for m, x in taken.items()]
        errors[name] = max(off, default=0.0)
        if variant.fixed:
            graph = load(folder / name / "model.pte", cuda_graph=True)
            times[f"{name}, graph"] = {m: microseconds(partial(graph, x), calls[m]) for m, x in taken.items()}
            if any(not torch.equal(graph(x)[0], run(x)[0]) for x in taken.values()):
                print(f"{name}: the results of the graph differ from those without", file=sys.stderr)
        data = sum(path.stat().st_size for path in (folder / name).glob("*.ptd"))
        sizes[name] = f"{data / 1e6:.1f} MB, {(folder / name / 'seconds').read_text()} s"
        del run
    times[CUBLAS] = {m: microseconds(captured(dense, x), calls[m]) for m, x in inputs.items()}
    console = Console(width=180)
    limit = Limit.measured()
    console.print(table(times, rows, errors, sizes, floors(limit, rows, group)))
    console.print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, group size {group}, {limit}")


def floors(limit: Limit, rows: Sequence[int], group: int) -> dict[int, float]:
    """The lower limit of the microseconds of a call by rows: 4-bit weights, bf16 scales, x and the result."""
    weights = 2 * BLOCKS * FEATURES * HIDDEN
    read = weights * (1 / 2 + 2 / group)
    return {m: limit.microseconds(read + 2 * 2 * m * FEATURES, 2 * m * weights) for m in rows}


def table(
    times: dict[str, dict[int, float]],
    rows: Sequence[int],
    errors: dict[str, float],
    sizes: dict[str, str],
    least: dict[int, float],
) -> Table:
    """Times, the ratios of the Triton kernels to every other, and their fraction of the limit, ``least`` by rows."""
    result = Table("", *(f"M = {m}" for m in rows), "relative error", ".ptd, lowering", title="microseconds a call")
    for name, row in times.items():
        error = f"{errors[name]:.1e}" if name in errors else ""
        result.add_row(name, *(f"{row[m]:.0f}" if m in row else "" for m in rows), error, sizes.get(name, ""))
    ours = times.get("triton", {})
    for name, row in times.items():
        if name != "triton" and ours:
            ratios = (f"{ours[m] / row[m]:.2f}" if m in row else "" for m in rows)
            result.add_row(f"triton / {name}", *ratios, "", "")
    if ours:
        result.add_row("of the limit", *(f"{least[m] / ours[m] * 100:.0f} %" for m in rows), "", "")
    return result


if __name__ == "__main__":
    main()
