"""Rewrites of a traced graph that change no value.

Each takes the torch.fx graph module and changes it. Nodes carry what they compute in meta["val"].
"""

from torch import fx

from dfkd_engine.rewrites.constants import constant, drop_unused, fold_constants, name_constants
from dfkd_engine.rewrites.copies import describe, describe_operation, merge_equal, without_copies, without_writes
from dfkd_engine.rewrites.kernels import ordered_group_norms, plain_layer_norms, plain_max_pools, plain_products
from dfkd_engine.rewrites.views import plain_shapes

__all__ = ["constant", "describe", "describe_operation", "name_constants", "simplify"]


def simplify(module: fx.GraphModule) -> None:
    """All rewrites, in the order in which they help each other."""
    without_writes(module)
    plain_shapes(module)
    merge_equal(module)
    fold_constants(module)
    without_copies(module)
    plain_products(module)
    plain_shapes(module)  # of the products that were made
    merge_equal(module)
    plain_max_pools(module)
    plain_layer_norms(module)
    ordered_group_norms(module)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.recompile()
