"""``python -m et_cuda_passes``: the command line."""

from et_cuda_passes.cli import main

main()
