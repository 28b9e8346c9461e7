"""What is compared: how the linears are held, and what lowers them."""

from dataclasses import dataclass

from benchmarks.voxtral.dimensions import Dimensions

HINT = 3
"""Length of the example that a decoder is exported with; it is also the one that Voxtral's own exports use."""


@dataclass(frozen=True)
class Variant:
    """One artifact.

    Attributes:
        name: its own.
        summary: for the table.
        quantized: whether the linears are int4 in groups of 32.
        ours: lowered with ``ecp.CudaPartitioner``; else with the stock one.
        kernel: the int4 kernel that ``LinearInt4`` is told to use; None for its own choice.
        fused: whether linears of one input (q, k and v) are packed and launched as one.
        gated: whether a gated layer is one product.
        for_prompt: exported with an example as long as the prompt instead of ``HINT``.
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
        """The form of the weights that eager computes the right answer with."""
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
