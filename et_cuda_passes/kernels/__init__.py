"""Triton kernels, their launches, and the choice of a tiling."""
