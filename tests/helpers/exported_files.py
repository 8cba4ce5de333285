"""Changed copies of an exported ONNX file."""

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx

from d2zero_export.graph import ATTENTION_MASK
from d2zero_runtime.artifacts.contract import CONTRACT_KEY, EMBEDDINGS_INPUT, FEATURES
from d2zero_runtime.artifacts.onnx import CLASSIFIER_KEY, read_contract

Change = Callable[[onnx.ModelProto], object]


def changed(exported: Path, path: Path, change: Change, /, *removed: str, **fields: object) -> Path:
    """A copy with another graph, without some entries of its metadata, and with other fields of the contract."""
    proto = onnx.load(exported)
    change(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in removed}
    metadata[CONTRACT_KEY] = replace(read_contract(exported)[0], **fields).to_json()  # type: ignore[arg-type]
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
    return path


def same_graph(proto: onnx.ModelProto) -> None:
    """Change nothing."""


def without_features(proto: onnx.ModelProto) -> None:
    """Hand over logits only."""
    kept = [entry for entry in proto.graph.output if entry.name not in FEATURES]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def without_mask_names(proto: onnx.ModelProto) -> None:
    """Call the attention masks otherwise, as a tool that rewrites graphs may."""
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace(ATTENTION_MASK, "value_") for name in names]


def with_constant_classes(proto: onnx.ModelProto) -> None:
    """Take no class embeddings."""
    proto.graph.input.remove(next(entry for entry in proto.graph.input if entry.name == EMBEDDINGS_INPUT))


def with_classifier(change: Change) -> Change:
    """Change the classifier inside."""

    def changed_inside(proto: onnx.ModelProto) -> None:
        (entry,) = (entry for entry in proto.metadata_props if entry.key == CLASSIFIER_KEY)
        classifier = onnx.load_from_string(base64.b64decode(entry.value))
        change(classifier)
        entry.value = base64.b64encode(classifier.SerializeToString()).decode()

    return changed_inside


def older(exported: Path, path: Path) -> Path:
    """A copy like the files from before networks handed over their features."""
    return changed(exported, path, without_features, CLASSIFIER_KEY, query_dim=0)
