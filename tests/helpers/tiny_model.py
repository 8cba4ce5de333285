"""An ONNX file with the inputs, outputs and contract of an exported model, and next to nothing inside."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from d2zero_runtime.artifacts.contract import CONTRACT_KEY, EMBEDDINGS_INPUT, FEATURES, ModelContract
from d2zero_runtime.artifacts.onnx import CLASSIFIER_KEY
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
    classifier: bytes = b"",
    **changes: Any,
) -> Path:
    """An ONNX file.

    Args:
        path: The file.
        baked: Whether the embeddings are an initializer and no input.
        images: The shape of the images.
        classifier: The classifier beside the network, with which there are features, of width `WIDTH`.
        changes: Fields of the contract.
    """
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, images)]
    if not baked:
        inputs.append(helper.make_tensor_value_info(EMBEDDINGS_INPUT, TensorProto.FLOAT, ("classes", WIDTH)))
    features = FEATURES if classifier else ()
    graph = helper.make_graph(
        [
            helper.make_node("Relu", [EMBEDDINGS_INPUT], ["class_logits"]),
            helper.make_node("Relu", ["images"], ["mask_logits"]),
            *(helper.make_node("Relu", [EMBEDDINGS_INPUT], [name]) for name in features),
        ],
        "tiny",
        inputs,
        [
            helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, ("classes", WIDTH)),
            helper.make_tensor_value_info("mask_logits", TensorProto.FLOAT, images),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("classes", WIDTH)) for name in features),
        ],
        [numpy_helper.from_array(embeddings(), EMBEDDINGS_INPUT)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = {CONTRACT_KEY: contract(baked=baked, query_dim=WIDTH if classifier else 0, **changes).to_json()}
    if classifier:
        metadata[CLASSIFIER_KEY] = base64.b64encode(classifier).decode()
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path
