"""With this folder on PYTHONPATH a process finds none of the packages that a bare GPU machine may lack."""

from importlib.machinery import PathFinder

ABSENT = {
    *("accelerate", "datasets", "diffusers", "hypothesis", "matplotlib", "mlxtend", "nvidia.dali", "scipy", "sklearn"),
    *("tensorrt", "tensorrt_rtx", "torch_tensorrt", "webdataset", "xformers"),
}
find_spec = PathFinder.find_spec


def find_present(cls, fullname, path=None, target=None):
    return None if fullname in ABSENT else find_spec(fullname, path, target)


# In place: pytest's own finder asks this class, past sys.meta_path, for the packages that come with its plugins.
PathFinder.find_spec = classmethod(find_present)
