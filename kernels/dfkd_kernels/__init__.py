"""Counter-based noise and fused device code: an equation, its reference in PyTorch, its Triton kernel, one file each.

Needs torch, and Triton where a GPU (or Triton's interpreter) runs the kernels.
"""
