"""An ONNX file with the inputs, outputs and contract of an exported model, and next to nothing inside."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from d2zero_runtime.artifacts.contract import CONTRACT_KEY, EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.images import Preprocessing

CLASSES, WIDTH, QUERIES = 5, 8, 3


def contract(**changes: Any) -> ModelContract:
    values: dict[str, Any] = {
        "class_names": tuple(f"class {number}" for number in range(CLASSES)),
        "seen": (True,) * CLASSES,
        "active": (True,) * CLASSES,
        "vocabulary_source": {"encoder": "word2vec"},
        "text_dim": WIDTH,
        "num_queries": QUERIES,
        "preprocessing": Preprocessing(),
        **changes,
    }
    return ModelContract(**values)


def embeddings(classes: int = CLASSES) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((classes, WIDTH)).astype(np.float32)


def write_model(
    path: Path,
    baked: bool = False,
    images: tuple[str | int, ...] = ("batch", 3, "height", "width"),
    **changes: Any,
) -> Path:
    """Baked: the embeddings are an initializer and no input. `changes` are fields of the contract."""
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, images)]
    if not baked:
        inputs.append(helper.make_tensor_value_info(EMBEDDINGS_INPUT, TensorProto.FLOAT, ("classes", WIDTH)))
    graph = helper.make_graph(
        [
            helper.make_node("Relu", [EMBEDDINGS_INPUT], ["class_logits"]),
            helper.make_node("Relu", ["images"], ["mask_logits"]),
        ],
        "tiny",
        inputs,
        [
            helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, ("classes", WIDTH)),
            helper.make_tensor_value_info("mask_logits", TensorProto.FLOAT, images),
        ],
        [numpy_helper.from_array(embeddings(), EMBEDDINGS_INPUT)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.metadata_props.append(
        onnx.StringStringEntryProto(key=CONTRACT_KEY, value=contract(baked=baked, **changes).to_json())
    )
    onnx.save(model, path)
    return path
