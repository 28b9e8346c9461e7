"""The compared variants: the form of the linears, and their lowering."""

from dataclasses import dataclass

from benchmarks.voxtral.dimensions import Dimensions

HINT = 3
"""Length of the example that a decoder is exported with; Voxtral's own exports use the same."""


@dataclass(frozen=True)
class Variant:
    """One artifact.

    Attributes:
        name: name of the variant.
        summary: text for the table.
        quantized: whether the linears are int4 in groups of 32.
        ours: whether ``ecp.CudaPartitioner`` lowers it; else the stock partitioner.
        kernel: the int4 kernel for ``LinearInt4``; None for its default.
        fused: whether linears of one input (q, k and v) are packed and launched as one.
        gated: whether a gated layer is one product.
        for_prompt: whether the example of the export is as long as the prompt, instead of ``HINT``.
    """

    name: str
    summary: str
    quantized: bool = True
    ours: bool = False
    kernel: str | None = None
    fused: bool = True
    gated: bool = True
    for_prompt: bool = False

    def hint(self, dimensions: Dimensions) -> int:
        """Length of the example."""
        return dimensions.prompt if self.for_prompt else HINT

    @property
    def reference(self) -> str:
        """The form of the weights in the eager reference."""
        return "dequantized" if self.quantized else "float"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", "bf16, stock partitioner", quantized=False),
        Variant("generic", "int4 in int8, unrewritten, stock partitioner"),
        Variant("tinygemm", 'int4 packed, `LinearInt4(kernel="tinygemm")`', ours=True, kernel="tinygemm"),
        Variant("ours", "int4 packed, default passes", ours=True),
        Variant("unfused", "int4 packed, default passes but `FusedLinearInt4`", ours=True, fused=False),
        Variant("ungated", "int4 packed, default passes but `FuseGate`", ours=True, gated=False),
        Variant("bf16-prompt", "bf16, stock, tuned for the prompt's length", quantized=False, for_prompt=True),
    )
}
DEFAULT = ("bf16", "generic", "tinygemm", "ours")
