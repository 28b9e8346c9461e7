"""The compile specs of ExecuTorch's CUDA backend: what each does, and the check of their values.

The backend ignores an unknown key without a word. Source: ``executorch/backends/cuda/cuda_backend.py`` of executorch
1.5.1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from et_cuda_passes.graph.errors import UsageError


@dataclass(frozen=True)
class CompileSpecForm:
    """A compile spec.

    Attributes:
        values: the values that the backend accepts; empty for any text.
        default: without the spec.
        effect: what a value other than the default does.
    """

    values: tuple[str, ...]
    default: str
    effect: str


_ON_OFF = ("ON", "OFF")
CUDA_COMPILE_SPECS: Mapping[str, CompileSpecForm] = {
    "low_memory_mode": CompileSpecForm(
        _ON_OFF,
        "OFF",
        "ON saves a host copy of all constants for each method, the GPU copy of each mutated buffer during the "
        "compile, and the GPU memory of caches whose names contain kv_cache; the weights are serialized from files. "
        "ExecuTorch replaces functions of torch while it compiles.",
    ),
    "max_autotune": CompileSpecForm(
        _ON_OFF,
        "ON",
        "OFF lowers faster: Inductor then does not time the tilings of its own products and convolutions. Those are "
        "slower, the kernels of this package are the same.",
    ),
    "autotune_at_compile_time": CompileSpecForm(
        _ON_OFF,
        "Inductor's",
        "whether Inductor times its Triton kernels in a step of its own before it generates code.",
    ),
    "emulate_precision_casts": CompileSpecForm(
        _ON_OFF,
        "ON",
        "OFF keeps intermediate values of fused operators in fp32: faster, with other rounding than eager.",
    ),
    "triton_kernel_mode": CompileSpecForm(
        _ON_OFF, "ON", "OFF leaves out ExecuTorch's own Triton kernels, such as its attention."
    ),
    "platform": CompileSpecForm(("linux", "windows"), "linux", "windows compiles libraries for Windows."),
    "shim_library_path": CompileSpecForm(
        (), "that of the package", "with platform=windows, the folder of aoti_cuda_shims.lib."
    ),
}


def parse_compile_specs(texts: Iterable[str]) -> dict[str, str]:
    """Compile specs from texts ``KEY=VALUE``.

    Raises:
        UsageError: a text has another form, or as :func:`check_compile_specs`.
    """
    specs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"the compile spec {text!r} has no value: write KEY=VALUE, such as low_memory_mode=ON")
        if key in specs:
            raise UsageError(f"the compile spec {key} is given twice")
        specs[key] = value
    check_compile_specs(specs, "cuda")
    return specs


def check_compile_specs(specs: Mapping[str, str], target: str) -> None:
    """Check keys and values.

    Raises:
        UsageError: the target is not cuda, or a key or a value is unknown.
    """
    if specs and target != "cuda":
        raise UsageError(f"compile specs are options of the CUDA backend, and the target is {target}: leave them out")
    for key, value in specs.items():
        form = CUDA_COMPILE_SPECS.get(key)
        if form is None:
            raise UsageError(f"the CUDA backend has no compile spec {key!r}: it has {', '.join(CUDA_COMPILE_SPECS)}")
        if form.values and value not in form.values:
            raise UsageError(f"the compile spec {key} is {' or '.join(form.values)}, not {value!r}")
