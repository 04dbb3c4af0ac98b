"""What kernels and parsers want of single operations."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def plain_max_pools(module: fx.GraphModule) -> None:
    """Max pools without their indices, which nothing here uses; TensorRT's parser refuses them."""
    for node in list(module.graph.nodes):
        if node.target is not aten.max_pool2d_with_indices.default or any(u.args[1] != 0 for u in node.users):
            continue
        with module.graph.inserting_after(node):
            pool = module.graph.call_function(aten.max_pool2d.default, node.args, node.kwargs)
        pool.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(pool)
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def plain_products(module: fx.GraphModule) -> None:
    """A batch of products with one and the same matrix as one product of all rows.

    So a linear layer comes out on most inputs. On one that is not contiguous, as in the attention of a VAE or behind a
    slice of tokens, torch repeats its weights over the batch, where neither compilers nor 8 bits look for them.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.bmm.default):
        x, repeated = node.args
        turned = repeated.target is aten.transpose.int and {int(dim) % 3 for dim in repeated.args[1:]} == {1, 2}
        source = repeated.args[0] if turned else repeated  # turned: in the gradient
        many = node.meta["val"].shape[1]
        if (
            source.target is not aten.expand.default
            or source.args[0].meta["val"].dim() != 2
            or not isinstance(many, int)
        ):
            continue
        matrix = _turned(module, node, source.args[0]) if turned else source.args[0]
        inner, columns = matrix.meta["val"].shape
        with module.graph.inserting_before(node):
            rows = module.graph.call_function(aten.reshape.default, (x, [-1, inner]))
            product = module.graph.call_function(aten.mm.default, (rows, matrix))
            whole = module.graph.call_function(aten.reshape.default, (product, [-1, many, columns]))
        rows.meta = {**node.meta, "val": x.meta["val"].reshape(-1, inner)}
        product.meta = {**node.meta, "val": rows.meta["val"] @ matrix.meta["val"]}
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        module.graph.erase_node(node)


def _turned(module: fx.GraphModule, before: fx.Node, matrix: fx.Node) -> fx.Node:
    """The transpose of a matrix; of one that is a transpose itself, what it was."""
    if matrix.target is aten.t.default:
        origin: Any = matrix.args[0]
        assert isinstance(origin, fx.Node)
        return origin
    with module.graph.inserting_before(before):
        made = module.graph.call_function(aten.t.default, (matrix,))
    made.meta = {**matrix.meta, "val": matrix.meta["val"].t()}
    return made


def plain_layer_norms(module: fx.GraphModule) -> None:
    """Layer norms without the statistics that the gradient needs, which are computed beside them where they are used.

    ONNX has a layer norm of three results, and TensorRT's parser takes one of one.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.native_layer_norm.default:
            continue
        x, shape, *_, eps = node.args
        used = {user.args[1]: user for user in node.users}
        if not used.keys() & {1, 2}:
            continue
        axes = list(range(-len(shape), 0))

        def call(target: Any, *arguments: Any, node: fx.Node = node) -> fx.Node:
            made = module.graph.call_function(target, arguments)
            made.meta = {key: value for key, value in node.meta.items() if key != "val"}
            return made

        with module.graph.inserting_before(node):
            mean = call(aten.mean.dim, x, axes, True)
            centred = call(aten.sub.Tensor, x, mean)
            variance = call(aten.mean.dim, call(aten.mul.Tensor, centred, centred), axes, True)
            deviation = call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps))
        for place, result in ((1, mean), (2, deviation)):
            if place in used:
                result.meta["val"] = used[place].meta["val"]
                used[place].replace_all_uses_with(result)
                module.graph.erase_node(used[place])


def ordered_group_norms(module: fx.GraphModule) -> None:
    """Ask for the memory order that group norm's kernels take: NHWC on a CPU where it comes so, else NCHW.

    torch.group_norm does it by itself, but does not return the statistics that the gradient needs.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.native_group_norm.default:
            continue
        source = node.args[0]
        value = source.meta["val"]
        nhwc = (
            value.dim() == 4 and value.device.type == "cpu" and value.is_contiguous(memory_format=torch.channels_last)
        )
        order = torch.channels_last if nhwc else torch.contiguous_format
        with module.graph.inserting_before(node):
            ordered = module.graph.call_function(aten.contiguous.default, (source,), {"memory_format": order})
        ordered.meta = dict(node.meta, val=value)
        node.args = (ordered, *node.args[1:])
