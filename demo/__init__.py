"""The two commands on a real model: `python -m demo`, or `make demo`, which first creates the environment.

SmolLM2-135M-Instruct is exported twice, unquantized and with 4-bit weights, and both answer the same prompts. Every
export is a folder, so a second run reuses them.
"""
