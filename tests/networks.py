"""A small network for tests, as a file of one's own."""

from collections.abc import Sequence

from onnx import TensorProto, helper


def onnx_model(
    *,
    size: int = 32,
    gain: float = 1.0,
    channels_first: bool = False,
    keeps_axes: bool = False,
    unread: Sequence[str] = (),
    batch: int | str = "N",
) -> bytes:
    """The mean colour of a picture of floats, D = 3, times `gain`; `unread` are inputs without a use."""
    shape = [batch, 3, size, size] if channels_first else [batch, size, size, 3]
    axes = [2, 3] if channels_first else [1, 2]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=axes, keepdims=int(keeps_axes)),
        helper.make_node("Mul", ["mean", "gain"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in unread),
        ],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
        [helper.make_tensor("gain", TensorProto.FLOAT, [], [gain])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())
