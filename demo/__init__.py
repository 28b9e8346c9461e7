"""The main job on a real model: `python -m demo`, or `make demo`, which makes the environment first.

SmolLM2-135M-Instruct is quantized once and exported once; that one program is rewritten for a GPU and for the CPU,
and the CPU's runs and answers beside the unquantized model. Every step leaves a file, so a second run goes on where
the first one ended.
"""
