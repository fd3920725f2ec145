"""Builds an ONNX graph in memory whose weights stay where they are, in the safetensors files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from kvmesh.backends.models.weights import TensorRef

MICROSOFT = "com.microsoft"  # operators that ONNX Runtime adds to the standard set

_ONNX_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
_OPSET = 21
_IR_VERSION = 10

Shape = Sequence[int | str]


class GraphBuilder:
    """Collects the nodes of one graph.

    weights: tensors by name. root: the folder that external data is relative to; must hold every
    weight file at some depth, symbolic links resolved.
    """

    def __init__(self, name: str, weights: Mapping[str, TensorRef], root: Path) -> None:
        self._name = name
        self._weights = weights
        self._root = root
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def floats(self, name: str, shape: Shape) -> str:
        """Declares a float32 input."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def integers(self, name: str, shape: Shape) -> str:
        """Declares an int64 input."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
        return name

    def constant(self, name: str, values: Sequence[int]) -> str:
        """An int64 vector."""
        dims = [len(values)]
        self._initializers.append(helper.make_tensor(name, TensorProto.INT64, dims, list(values)))
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output and returns that output's name."""
        output = f"{operator}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(operator, list(inputs), [output], domain=domain, **attributes)
        )
        return output

    def output(self, name: str, value: str, shape: Shape) -> None:
        """Declares a float32 output that is the given value."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str) -> str:
        """A checkpoint tensor in float32. Half-precision ones are widened once, at load."""
        ref = self._weights[name]
        proto = TensorProto(name=name, dims=ref.shape, data_type=_ONNX_TYPES[ref.dtype])
        proto.data_location = TensorProto.EXTERNAL
        location = os.path.relpath(ref.file.resolve(), self._root)
        for key, value in (("location", location), ("offset", ref.offset), ("length", ref.length)):
            proto.external_data.add(key=key, value=str(value))
        self._initializers.append(proto)
        if ref.dtype == "F32":
            return name
        return self.node("Cast", name, to=TensorProto.FLOAT)

    def build(self) -> bytes:
        """The serialised ModelProto."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, self._initializers
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return model.SerializeToString()
