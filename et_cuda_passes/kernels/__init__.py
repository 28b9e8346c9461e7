"""Kernels: what each can take, and how one is chosen."""
