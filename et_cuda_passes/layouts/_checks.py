"""Checks of the arguments that all layouts share."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

INNER_K_TILES = (8, 4, 2)


def require_tensor(t: object, name: str) -> torch.Tensor:
    """Return `t` if it is a tensor with data; raise TypeError for another type, ValueError for meta or fake tensors."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if isinstance(t, FakeTensor) or t.is_meta:
        kind = "a fake" if isinstance(t, FakeTensor) else "a meta"
        raise ValueError(
            f"{name} is {kind} tensor and has no values; load the real weights, and call outside of FakeTensorMode"
        )
    return t


def require_dtype(t: torch.Tensor, name: str, allowed: tuple[torch.dtype, ...], fix: str) -> None:
    """Raise TypeError, with `fix` in the message, if the dtype of `t` is not in `allowed`."""
    if t.dtype not in allowed:
        wanted = " or ".join(str(d) for d in allowed)
        raise TypeError(f"{name} must be {wanted}, got {t.dtype}; {fix}")


def require_weight(
    q: object, offset: int, n_multiple: int, k_multiple: int, layout: str, out_rows: int | None = None
) -> tuple[torch.Tensor, int, int]:
    """Return `q`, the number of rows of the result, and K, if `q` is a 2-D, non-empty int8 or uint8 tensor.

    The number of rows is `out_rows`, or that of `q`; it and K must be multiples of `n_multiple` and `k_multiple`.
    """
    t = require_tensor(q, "q")
    require_dtype(t, "q", (torch.uint8, torch.int8), "give integer weights, one per element")
    if t.dim() != 2:
        raise ValueError(f"q must be 2-D [N, K], got shape {tuple(t.shape)}; reshape to [out_features, in_features]")
    n, k = t.shape
    if n == 0 or k == 0:
        raise ValueError(f"q is empty, shape {tuple(t.shape)}; give a weight with rows and columns")
    if out_rows is not None:
        if out_rows < n:
            raise ValueError(f"out_rows must be at least q's {n} rows, got {out_rows}")
        n = out_rows
    if n % n_multiple:
        raise ValueError(
            f"{layout} needs N to be a multiple of {n_multiple}, got N = {n}; "
            f"give out_rows={-(-n // n_multiple) * n_multiple} and slice the linear's output"
        )
    if k % k_multiple:
        raise ValueError(f"{layout} needs K to be a multiple of {k_multiple}, got K = {k}")
    if type(offset) is not int or not 0 <= offset <= 15:
        raise ValueError(f"offset must be an int in 0..15, got {offset!r}; 8 turns -8..7 into 0..15")
    return t, n, k


def require_inner_k_tiles(inner_k_tiles: object) -> int:
    """Return `inner_k_tiles` if it is 2, 4 or 8; raise ValueError otherwise."""
    if type(inner_k_tiles) is not int or inner_k_tiles not in INNER_K_TILES:
        raise ValueError(f"inner_k_tiles must be 2, 4 or 8, got {inner_k_tiles!r}")
    return inner_k_tiles


def require_four_bits(chunk: torch.Tensor, offset: int) -> None:
    """Raise ValueError if chunk + offset leaves 0..15, because it would overwrite the bits of neighbouring weights."""
    low, high = (int(v) for v in torch.aminmax(chunk))
    if low + offset < 0 or high + offset > 15:
        hint = "pass offset=8 for weights in -8..7" if offset == 0 else "pass offset=0 for weights in 0..15"
        raise ValueError(
            f"weights must lie in {-offset}..{15 - offset} (offset {offset}), found {low}..{high}; "
            f"{hint}, or check that the weight is 4-bit"
        )
