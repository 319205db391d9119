"""The provider for GPUs: Triton kernels."""
