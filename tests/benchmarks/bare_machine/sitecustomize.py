"""With this folder on PYTHONPATH a process finds none of the packages that a bare GPU machine may lack."""

import sys
from importlib.machinery import PathFinder

ABSENT = {
    *("accelerate", "datasets", "diffusers", "matplotlib", "mlxtend", "nvidia.dali", "scipy", "sklearn"),
    *("tensorrt", "tensorrt_rtx", "torch_tensorrt", "webdataset", "xformers"),
}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in ABSENT else PathFinder.find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
