"""Triton kernels for diffusion sampling and distillation, each beside its equation and its reference in PyTorch.

Needs torch, and Triton where a GPU (or Triton's interpreter) runs the kernels; on a CPU the references run.
"""
