"""Triton kernels and what launches them; nothing here is imported before a CUDA tensor needs it."""
