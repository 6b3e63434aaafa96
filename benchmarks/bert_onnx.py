"""BERT as an ONNX graph of the operators that onnxruntime's own optimizer fuses such models to, and its int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]


class Graph:
    """Nodes as they come, each of which has a name of its own for what it gives."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []

    def array(self, value: np.ndarray) -> str:
        name = f"array_{len(self.arrays)}"
        self.arrays.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, domain: str = "com.microsoft", outputs: int = 1, **options: Any) -> str:
        names = [f"out_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, names[0], domain=domain, **options))
        return names[0]


def graph_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """i32 `ids` and `mask` [texts, tokens] to means over tokens [texts, D], or logits where there is a classifier."""
    prefix = "bert." if "classifier.weight" in tensors else ""
    graph = Graph()

    def tensor(name: str) -> np.ndarray:
        return tensors[prefix + name]

    def norm(name: str) -> list[str]:
        return [graph.array(tensor(f"{name}.{part}")) for part in ("weight", "bias")]

    def linear(x: str, name: str) -> tuple[str, str]:
        """A product, and the bias that the next operator adds."""
        product = graph.add("MatMul", x, graph.array(tensor(f"{name}.weight").T), domain="")
        return product, graph.array(tensor(f"{name}.bias"))

    tables = [
        graph.array(tensor(f"embeddings.{kind}_embeddings.weight")) for kind in ("word", "position", "token_type")
    ]
    eps = config["layer_norm_eps"]
    given = "ids", "types", *tables, *norm("embeddings.LayerNorm"), "mask"
    graph.nodes.append(helper.make_node("Sub", ["ids", "ids"], ["types"]))
    graph.nodes.append(
        helper.make_node(
            "EmbedLayerNormalization", list(given), ["embedded", "ends"], domain="com.microsoft", epsilon=eps
        )
    )
    x = "embedded"
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        qkv = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([tensor(f"{name}.weight").T for name in qkv], axis=1)
        bias = np.concatenate([tensor(f"{name}.bias") for name in qkv])
        heads = config["num_attention_heads"]
        attended = graph.add("Attention", x, graph.array(weight), graph.array(bias), "ends", num_heads=heads)
        product, more = linear(attended, f"{layer}.attention.output.dense")
        output = norm(f"{layer}.attention.output.LayerNorm")
        x = graph.add("SkipLayerNormalization", product, x, *output, more, epsilon=eps)
        wide = graph.add("BiasGelu", *linear(x, f"{layer}.intermediate.dense"))
        product, more = linear(wide, f"{layer}.output.dense")
        x = graph.add("SkipLayerNormalization", product, x, *norm(f"{layer}.output.LayerNorm"), more, epsilon=eps)
    if prefix:
        first = graph.add("Gather", x, graph.array(np.int64(0)), domain="", axis=1)
        pooled = graph.add("Tanh", graph.add("Add", *linear(first, "pooler.dense"), domain=""), domain="")
        prefix = ""
        out, shape = graph.add("Add", *linear(pooled, "classifier"), domain=""), len(tensors["classifier.weight"])
    else:
        real = graph.add("Cast", "mask", domain="", to=TensorProto.FLOAT)
        rows = graph.add("Unsqueeze", real, graph.array(np.array([1])), domain="")
        total = graph.add("Squeeze", graph.add("MatMul", rows, x, domain=""), graph.array(np.array([1])), domain="")
        count = graph.add("ReduceSum", real, graph.array(np.array([1])), domain="", keepdims=1)
        out, shape = graph.add("Div", total, count, domain=""), config["hidden_size"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT32, ["B", "T"]) for name in ("ids", "mask")]
    result = helper.make_tensor_value_info(out, TensorProto.FLOAT, ["B", shape])
    made = helper.make_graph(graph.nodes, "bert", inputs, [result], graph.arrays)
    return helper.make_model(made, opset_imports=OPSETS, ir_version=8)


def write_onnx(folder: Path, kind: str) -> Path:
    """Of a checkpoint, float32 or int8; what is there stays."""
    file = folder / f"{kind}.onnx"
    if file.exists():
        return file
    if kind == "float32":
        config = json.loads((folder / "config.json").read_text())
        onnx.save(graph_of(config, load_file(folder / "model.safetensors")), file)
        return file
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"DefaultTensorType": TensorProto.FLOAT}  # which shape inference can't tell of these operators
    quantize_dynamic(write_onnx(folder, "float32"), file, weight_type=QuantType.QInt8, extra_options=options)
    return file
