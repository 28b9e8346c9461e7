"""Adapters to ExecuTorch: partitioners that take ``passes=``."""
