"""What to quantize with instead, where a weight is in a form that no kernel of a target takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SuggestedSchemes:
    """The schemes that a target takes a linear's weight in, as a user of torchao writes them.

    Attributes:
        four_bits: in place of a weight of up to 4 bits an element.
        eight_bits: in place of a wider one.
    """

    four_bits: str = "IntxWeightOnlyConfig(torch.int4, PerGroup(32))"
    eight_bits: str = "IntxWeightOnlyConfig(torch.int8, PerAxis(0))"

    def for_bits(self, bits: int) -> str:
        """The nearest scheme to a weight of ``bits`` bits an element."""
        return self.four_bits if bits <= 4 else self.eight_bits
