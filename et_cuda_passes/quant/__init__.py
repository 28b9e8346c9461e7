"""Quantization schemes: the one decoder of dequantize operators, and where dequantized weights are read."""
