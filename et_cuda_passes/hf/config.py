"""``EtConfig``: how a component of a model is exported."""

from dataclasses import dataclass, fields
from typing import Any

from transformers.exporters.configs import DynamoConfig

from et_cuda_passes.executorch.compile_specs import check_compile_specs
from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.hf.options import QuantizationOptions, check_schemes, check_weight_only, split_targets
from et_cuda_passes.kernels.gpus import gpu_arch

FORMAT = "et_cuda_passes"


@dataclass
class EtConfig(DynamoConfig):  # type: ignore[misc]  # transformers is not followed
    """How :class:`EtExporter` exports a component: the fields of transformers' ``DynamoConfig``, and these.

    Attributes:
        target: what the export is for, "cuda", "xnnpack", "cpu", "metal", or several, separated by commas. The first
            that runs on a machine is the default there.
        max_length: with ``dynamic=True``, the largest length of a text; then the length is the only dynamic size. None
            makes every size dynamic that the model does not fix.
        xnnpack_weight_only: what becomes of a 4-bit weight for xnnpack if the scheme does not quantize activations, as
            "4w". "fold" makes it a float weight, with the same numbers. "dynamic-activation" takes the 4-bit kernels,
            for which activations are quantized to 8 bits while the program runs: this changes the numbers. A weight
            that these kernels do not support is folded, and the report says so.
        gpu: for cuda, the GPU whose tilings the kernels get; see :func:`et_cuda_passes.rewrite`.
        stream: a folder for the packed constants while they are lowered; with one target only, because the traced
            program is given up. See :func:`et_cuda_passes.rewrite`.
        cache: a folder or an fsspec URL with packed constants of earlier exports, or a
            :class:`~et_cuda_passes.PackedCache`; see :func:`et_cuda_passes.rewrite`.
        compile_specs: for cuda, those of ExecuTorch's backend, by key; see
            :func:`et_cuda_passes.executorch.lower.lower`.

    The others are those of :class:`~et_cuda_passes.hf.schemes.QuantizationOptions`.

    Raises:
        ValueError: no target is named, or an option is not valid or not possible on a target.
    """

    export_format: str = FORMAT

    target: str | list[str] | None = None
    qlinear: str | None = None
    qlinear_group_size: int = 32
    qlinear_packing_format: str | None = None
    qembedding: str | None = None
    qembedding_group_size: int = 0
    qlinear_encoder: str | None = None
    qlinear_group_size_encoder: int = 32
    qlinear_packing_format_encoder: str | None = None
    qembedding_encoder: str | None = None
    qembedding_group_size_encoder: int = 0
    algorithm: str = "hqq"
    recipe: Any = None
    group_size_fallback: str = "adjust"
    cast_to_bf16: bool = False
    max_length: int | None = None
    xnnpack_weight_only: str = "fold"
    gpu: str | None = None
    stream: str | None = None
    cache: Any = None
    compile_specs: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ExportError("EtConfig needs a target, such as target='cpu' or target='cuda,xnnpack'")
        check_weight_only(self.xnnpack_weight_only, self.targets)
        if self.gpu is not None:
            if "cuda" not in self.targets:
                raise ExportError(
                    f"gpu={self.gpu!r} selects the tilings of cuda, and the target is {', '.join(self.targets)}: add "
                    "cuda to the target, or leave the option out"
                )
            gpu_arch(self.gpu)
        if self.stream is not None and len(self.targets) > 1:
            raise ExportError(
                f"stream={self.stream!r} gives up the traced program for one target, and the targets are "
                f"{', '.join(self.targets)}: export them one by one, or leave the option out"
            )
        if self.compile_specs:
            check_compile_specs(self.compile_specs, "cuda" if "cuda" in self.targets else self.targets[0])
        check_schemes(self.options)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets."""
        return split_targets(self.target)

    @property
    def options(self) -> QuantizationOptions:
        """The quantization."""
        return QuantizationOptions(**{each.name: getattr(self, each.name) for each in fields(QuantizationOptions)})

    @property
    def quantizes(self) -> bool:
        """Whether anything is to be quantized."""
        schemes = (self.qlinear, self.qembedding, self.qlinear_encoder, self.qembedding_encoder, self.recipe)
        return any(scheme is not None for scheme in schemes)

    @property
    def quantizes_activations(self) -> bool:
        """Whether a program may quantize activations while it runs."""
        dynamic = any(scheme.dynamic for scheme, _ in self.options.schemes().values())
        return dynamic or self.xnnpack_weight_only == "dynamic-activation"


def config_of(config: EtConfig | dict[str, Any]) -> EtConfig:
    """A config from its fields."""
    if isinstance(config, dict):
        return EtConfig(**config)
    if not isinstance(config, EtConfig):
        raise TypeError(f"the config must be an EtConfig or a dict with its fields, not {type(config).__name__}")
    return config
