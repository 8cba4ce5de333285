"""Classifiers as they are exported: as the last part of the network, and by themselves.

The same functions as `d2zero.model.classifier` and `d2zero.model.closed`, as one graph for any vocabulary. What depends
on the vocabulary only is computed once for all images of a batch.

Letters: B batch, Q queries, K classes, C hidden channels, D text width, E semantic width.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from d2zero.model import D2Zero
from d2zero.model.classifier import SemanticClassifier
from d2zero.model.closed import ClosedClassifier
from d2zero_export.attention import FusedAttention, MatmulAttention, projected
from d2zero_export.onnx_graph import TRACED_CLASSES, check_graph, translate
from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, FEATURES, OUTPUTS

Attention = MatmulAttention | FusedAttention
MOST_KEPT = 4
_made: dict[str, bytes] = {}  # by digest: one checkpoint is exported in several forms, and tracing takes seconds


class ClassifierGraph(nn.Module):
    """`(queries, background, class_embeddings) → class_logits`, in two steps."""

    def forward(self, queries: Tensor, background: Tensor, class_embeddings: Tensor) -> Tensor:
        """Class logits (B, Q, K + 1), float32, the background last.

        Args:
            queries: (B, Q, C) normalised.
            background: (B, C) L2-normalised; anything if it is not read.
            class_embeddings: (K, D).
        """
        return self.classify(queries, background, self.project(class_embeddings))

    def project(self, class_embeddings: Tensor) -> Tensor:
        """What depends on the classes only."""
        raise NotImplementedError

    def classify(self, queries_BQC: Tensor, background_BC: Tensor, classes: Tensor) -> Tensor:
        """The same as `forward` for classes that are projected."""
        raise NotImplementedError


class ClosedGraph(ClassifierGraph):
    """A linear layer, whose outputs the classes choose.

    Args:
        classifier: Its weights are shared; it computes in their precision.
    """

    def __init__(self, classifier: ClosedClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def project(self, class_embeddings: Tensor) -> Tensor:
        """As they are, (K, D)."""
        return class_embeddings

    def classify(self, queries_BQC: Tensor, background_BC: Tensor, classes: Tensor) -> Tensor:
        """See `ClassifierGraph`."""
        logits: Tensor = self.classifier(queries_BQC.to(_precision(self.classifier)), background_BC, classes)
        return logits


class SemanticGraph(ClassifierGraph):
    """Queries against class text, adapted to the image.

    Args:
        classifier: Its weights are shared; it computes in their precision.
        attention: How its adaptation attends.
    """

    def __init__(self, classifier: SemanticClassifier, attention: Attention) -> None:
        super().__init__()
        self.classifier, self.attention = classifier, attention

    def project(self, class_embeddings: Tensor) -> Tensor:
        """In semantic space, (K, E)."""
        text_KE: Tensor = self.classifier.text_projection(class_embeddings.to(_precision(self.classifier)))
        return text_KE

    def classify(self, queries_BQC: Tensor, background_BC: Tensor, classes: Tensor) -> Tensor:
        """See `ClassifierGraph`."""
        classifier, precision = self.classifier, _precision(self.classifier)
        queries_BQE = F.normalize(classifier.query_projection(queries_BQC.to(precision)), dim=-1)
        background_BE = F.normalize(classifier.background_projection(background_BC.to(precision)), dim=-1)
        text_KE = F.normalize(classes, dim=-1)
        text = _joined(text_KE, background_BE)
        if classifier.adaptation is not None:
            for number, layer in enumerate(classifier.adaptation.layers):
                parts = (text,) if number else (text_KE, background_BE)  # apart, classes are projected once
                text = self._adapted(layer, text, queries_BQE, self._attended(layer.self_attn, parts))
            assert classifier.adaptation.norm is not None
            text = F.normalize(classifier.adaptation.norm(text), dim=-1)
        logits: Tensor = classifier.logit_scale.float() * (queries_BQE.float() @ text.float().transpose(1, 2))
        return logits

    def _attended(self, own: nn.MultiheadAttention, parts: Sequence[Tensor]) -> Tensor:
        """Self-attention of all classes: (B, K + 1, E), or classes and backgrounds apart."""
        asking, keys, values = (
            entries[0] if len(entries) == 1 else _joined(*entries)
            for entries in ([projected(part, own, which) for part in parts] for which in range(3))
        )
        return self.attention(own, asking, self.attention.laid_out(keys), values)  # type: ignore[no-any-return]

    def _adapted(self, layer: nn.TransformerDecoderLayer, text: Tensor, queries: Tensor, attended: Tensor) -> Tensor:
        """One transformer decoder layer, post-norm, without dropout, after its self-attention."""
        text = layer.norm1(text + attended)
        cross = layer.multihead_attn
        keys, values = self.attention.keys(cross, queries), projected(queries, cross, 2)
        text = layer.norm2(text + self.attention(cross, projected(text, cross, 0), keys, values))
        output: Tensor = layer.norm3(text + layer.linear2(F.relu(layer.linear1(text))))
        return output


def classifier_graph(model: D2Zero, attention: Attention) -> ClassifierGraph:
    """A model's classifier as a graph.

    Args:
        model: Its weights are shared.
        attention: How a semantic classifier's adaptation attends.
    """
    if isinstance(model.classifier, ClosedClassifier):
        return ClosedGraph(model.classifier)
    return SemanticGraph(model.classifier, attention)


def _precision(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _joined(text_KE: Tensor, background_BE: Tensor) -> Tensor:
    """Classes and the background of each image, (B, K + 1, E)."""
    return torch.cat([text_KE.expand(background_BE.shape[0], -1, -1), background_BE[:, None]], dim=1)


def classifier_onnx(model: D2Zero) -> bytes:
    """A model's classifier by itself, as an ONNX file: any number of images and classes, float32.

    Args:
        model: On any device; not changed.
    """
    digest = _digest(model)
    if digest not in _made:
        while len(_made) >= MOST_KEPT:
            del _made[next(iter(_made))]
        _made[digest] = _traced(model)
    return _made[digest]


def _digest(model: D2Zero) -> str:
    """Of all that the classifier's graph depends on."""
    digest = hashlib.sha256(repr((model.config, list(model.classifier.state_dict()))).encode())
    for values in model.classifier.state_dict().values():
        digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _traced(model: D2Zero) -> bytes:
    config, device = model.config, model.class_embeddings.device
    graph = classifier_graph(model, MatmulAttention(model.decoder)).eval()
    shapes = ((2, config.num_queries, config.hidden_dim), (2, config.hidden_dim), (TRACED_CLASSES, config.text_dim))
    batch, classes = Dim("batch", min=1, max=65_536), Dim("classes", min=1, max=100_000)
    with torch.no_grad():
        program = torch.export.export(
            graph,
            tuple(torch.randn(shape, device=device) for shape in shapes),
            dynamic_shapes=({0: batch}, {0: batch}, {0: classes}),
            strict=False,
        )
    proto = translate(program, [*FEATURES, EMBEDDINGS_INPUT], [OUTPUTS[0]])
    check_graph(proto)
    content: bytes = proto.SerializeToString()
    return content
