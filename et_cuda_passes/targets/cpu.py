"""cpu: plain AOTInductor on the CPU. A packed program runs only on hosts with the packing host's instruction set."""

from dataclasses import replace

import torch

from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.rules.embedding import EmbeddingInt4, EmbeddingInt8
from et_cuda_passes.rules.epilogue import RemoveLinearViews
from et_cuda_passes.rules.experts import BmmInt4, EinsumInt4, GroupedMmInt4, IndexedBmmInt4
from et_cuda_passes.rules.fold import FoldFloats
from et_cuda_passes.rules.linear import ConvInt4, ConvInt8, LinearInt4, LinearInt8
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import INT8, PLAIN, PLAIN_INT4, Target

_WITHOUT_AVX512 = {
    "AVX2": "on a host with AVX2 and no AVX-512, a product with one row takes up to 1.4 times as long as with bf16 "
    "weights, and one with 8 rows a third of the time"
}
_INT4PACK = Kernel(
    "int4pack_cpu",
    layout="cpu",
    # In fp16 and fp32 it is scalar code, and plain operators are faster; docs/reference/performance.md has the times.
    dtypes=(torch.bfloat16,),
    group_sizes=(32, 64, 128, 256),
    in_multiple=32,
    out_multiple=16,
    host_notes=_WITHOUT_AVX512,
    # In a branch, Inductor passes the group size as a constant of the branch, which is missing in the generated code.
    in_control_flow=False,
)

CPU = Target(
    "cpu",
    "AOTInductor on the CPU",
    kernels={
        # Plain operators by option too: their layout is the same on every host.
        "int4_linear": (_INT4PACK, PLAIN_INT4),
        # The layout of the linear depends on the instruction set, so single rows cannot be read.
        "int4_table": (replace(PLAIN_INT4, name="rows"),),
        "int4_experts": (_INT4PACK,),
        # Only a layout in which every expert starts at a known offset can be indexed by a tensor of ids.
        "int4_indexed_experts": (
            Kernel("rows", layout="mma_tiled", dtypes=PLAIN.dtypes, group_sizes=(32, 64, 128), in_multiple=32),
        ),
        "int8_linear": (
            Kernel(
                "int8pack_cpu",
                layout=INT8,
                # As above.
                dtypes=(torch.bfloat16,),
                in_multiple=16,
                zeros=False,
                per_row=True,
            ),
        ),
        "int8_plain": (PLAIN,),
        "int4_plain": (PLAIN_INT4,),
    },
    passes=lambda: [
        *restoring(),
        # int4 is before int8: its constants are half as large.
        LinearInt4(),
        LinearInt8(),
        ConvInt4(),
        ConvInt8(),
        BmmInt4(),
        IndexedBmmInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        FoldFloats(),
        RemoveLinearViews(),
    ],
)
