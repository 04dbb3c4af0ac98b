"""A module whose shared libraries are missing, as the wheels of tensorrt are without NVIDIA's package index."""

raise ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory")
