"""The exported classifier computes what the model's computes, for any numbers of images and classes."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_model import WIDTH
from tiny_network import tiny, tiny_closed
from torch import Tensor
from torch.nn import ModuleList

from d2zero.model import D2Zero
from d2zero.model.classifier import SemanticClassifier
from d2zero_export.attention import FusedAttention, MatmulAttention
from d2zero_export.classifier import classifier_graph, classifier_onnx
from d2zero_export.onnx_graph import FORBIDDEN, OPSET
from d2zero_runtime.backends.onnxruntime import OnnxClassifier

TOLERANCE = 1e-4  # of logits up to 100


# Making a file takes seconds; the quick tests do it once.
in_files = pytest.mark.parametrize(
    "model",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), "closed"],
    indirect=True,
)


@pytest.fixture(scope="module", params=[0, 1, 2, "closed"], ids="adaptation layers or head: {}".format)
def model(request: pytest.FixtureRequest) -> D2Zero:
    if request.param == "closed":
        return tiny_closed()
    found = tiny(adaptation_layers=request.param)
    assert isinstance(found.classifier, SemanticClassifier)
    layers = found.classifier.adaptation.layers if found.classifier.adaptation else ()
    assert isinstance(layers, tuple | ModuleList) and len(layers) == request.param
    return found


@pytest.fixture(scope="module")
def exported_classifier(model: D2Zero) -> bytes:
    return classifier_onnx(model)


def inputs(model: D2Zero, images: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, background and class embeddings that differ in every image."""
    random = torch.Generator().manual_seed(images * classes)
    shape = (images, model.config.num_queries, model.config.hidden_dim)
    queries = torch.randn(shape, generator=random)
    background = torch.nn.functional.normalize(torch.randn(images, shape[2], generator=random), dim=-1)
    return queries, background, torch.randn(classes, WIDTH, generator=random)


def cases() -> list[tuple[int, int]]:
    """Numbers of images and classes."""
    return [(images, classes) for images in (1, 3) for classes in (1, 7, 1203)]


@pytest.mark.parametrize("attention", [MatmulAttention, FusedAttention])
def test_the_graph_equals_the_models_classifier(
    model: D2Zero, attention: type[MatmulAttention] | type[FusedAttention]
) -> None:
    graph = classifier_graph(model, attention(model.decoder)).eval()
    for images, classes in cases():
        given = inputs(model, images, classes)
        with torch.inference_mode():
            found, expected = graph(*given), model.classifier(*given)
        assert found.shape == (images, model.config.num_queries, classes + 1)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@in_files
def test_the_file_equals_the_models_classifier(model: D2Zero, exported_classifier: bytes) -> None:
    classifier = OnnxClassifier(lambda: exported_classifier, Path("a file"))
    for images, classes in cases():
        given = inputs(model, images, classes)
        with torch.inference_mode():
            expected = model.classifier(*given).numpy()
        found = classifier.run(*(array.numpy() for array in given))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0, err_msg=f"{images} images, {classes}")


@in_files
def test_images_of_a_batch_do_not_influence_each_other(model: D2Zero, exported_classifier: bytes) -> None:
    classifier = OnnxClassifier(lambda: exported_classifier, Path("a file"))
    queries, background, words = (array.numpy() for array in inputs(model, 3, 7))
    together = classifier.run(queries, background, words)
    for row in range(3):
        apart = classifier.run(queries[row : row + 1], background[row : row + 1], words)
        np.testing.assert_allclose(together[row], apart[0], atol=TOLERANCE, rtol=0)


@in_files
def test_the_file_is_one_that_every_runtime_runs(exported_classifier: bytes) -> None:
    proto = onnx.load_from_string(exported_classifier)
    assert not {node.op_type for node in proto.graph.node} & FORBIDDEN
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET
    assert [entry.name for entry in proto.graph.input] == ["queries", "background", "class_embeddings"]
    assert [entry.name for entry in proto.graph.output] == ["class_logits"]
    assert b"d2zero_export" not in exported_classifier  # no traces of who made it where


@pytest.mark.parametrize("model", [1], indirect=True)
def test_a_checkpoint_hands_over_its_classifier_as_a_file(
    model: D2Zero, exported_classifier: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of: list[D2Zero] = []

    def entry_points(group: str, name: str) -> list[Any]:
        assert (group, name) == ("d2zero.exporters", "classifier")
        return [SimpleNamespace(load=lambda: lambda given: made_of.append(given) or exported_classifier)]

    monkeypatch.setattr("d2zero.model.inference.entry_points", entry_points)
    ours = model.segmenter().classifier
    theirs = OnnxClassifier(ours.to_onnx, Path("a file"))
    given = [array.numpy() for array in inputs(model, 3, 7)]
    np.testing.assert_allclose(ours.run(*given), theirs.run(*given), atol=TOLERANCE, rtol=0)
    assert theirs.to_onnx() == exported_classifier and made_of == [model]  # read once


def test_what_exports_the_classifier_is_registered() -> None:
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    (target,) = scripts["d2zero.exporters"].values()
    assert EntryPoint("classifier", target, "d2zero.exporters").load() is classifier_onnx
