"""What the Triton kernels for the sparse operators on CUDA share; see ``docs/kernels.md``."""
