"""The package on a real model: `python -m demo`, or `make demo`, which first creates the environment.

SmolLM2-135M-Instruct is quantized once and exported once. That program is rewritten for a GPU and for the CPU. The CPU
program runs and answers beside the unquantized model. Every step writes a file, so a second run resumes the first one.
"""
