"""The whole model: backbone, pixel decoder, masked decoder, semantic classifier.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2zero.model.backbone import Backbone
from d2zero.model.classifier import SemanticClassifier, background_embedding
from d2zero.model.closed import ClosedClassifier
from d2zero.model.config import ModelConfig
from d2zero.model.decoder import MaskedDecoder
from d2zero.model.deformable import DeformableAttention, DeformableFunction
from d2zero.model.inference import TorchBackend, TorchClassifier
from d2zero.model.pixel_decoder import PixelDecoder
from d2zero_runtime import D2ZeroError, Detections, Mode, Preprocessing, Segmenter, Vocabulary
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.images import Size
from d2zero_runtime.masks.postprocess import ModeName
from d2zero_runtime.segmenter import RawOutput
from d2zero_runtime.vocabulary import check_vocabulary


class HeadOutput(NamedTuple):
    """What one head predicts."""

    class_logits: Tensor  # (B, Q, K + 1), the background last
    mask_logits: Tensor  # (B, Q, H/4, W/4)
    queries: Tensor  # (B, Q, C), normalised
    background: Tensor  # (B, C), mean mask feature of what no query claims, L2-normalised; zeros if not read


class D2Zero(nn.Module):
    """Zero-shot instance segmentation by class text.

    Args:
        backbone: Maps at strides 4, 8, 16, 32.
        pixel_decoder: Mask features and three memory levels.
        decoder: Queries and masks.
        classifier: Class logits.
        vocabulary: The default classes. Their embeddings live in the state, so that moving, saving and
            loading carry them.
        config: What the parts were built from; read for preprocessing and the softmax temperature.
    """

    class_embeddings: Tensor

    checkpoint: str = ""
    """SHA-256 of the file that the weights were loaded from; empty if there is none, or they may have been trained."""

    def __init__(
        self,
        backbone: Backbone,
        pixel_decoder: PixelDecoder,
        decoder: MaskedDecoder,
        classifier: SemanticClassifier | ClosedClassifier,
        vocabulary: Vocabulary,
        config: ModelConfig,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.decoder = decoder
        self.classifier = classifier
        self.config = config
        self.register_buffer("class_embeddings", torch.empty(0))
        self.set_vocabulary(vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes that `forward` uses when it is given none."""
        return self._vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input."""
        return self.config.preprocessing

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Replace the default classes.

        Raises:
            D2ZeroError: The embeddings have another width than the model's, or another encoder made them; or the
                model is closed and the classes are not its own.
        """
        closed = self.config.head == "closed"
        check_vocabulary(vocabulary, self.config.text_dim, getattr(self, "_vocabulary", None), closed)
        self._vocabulary = vocabulary
        self.class_embeddings = torch.from_numpy(vocabulary.embeddings.copy()).to(self.class_embeddings.device)

    def forward(
        self,
        images_B3HW: Tensor,
        class_embeddings_KD: Tensor | None = None,
        all_heads: bool = False,
        attention_masks: Sequence[Tensor] | None = None,
    ) -> list[HeadOutput]:
        """Run the network.

        Args:
            images_B3HW: (B, 3, H, W) float32, normalised and padded; H and W multiples of 32.
            class_embeddings_KD: Classes to compare with; the vocabulary's by default. Training gives the
                seen classes only.
            all_heads: Classify at every head (training) or only at the last one (inference).
            attention_masks: See `MaskedDecoder.forward`.

        Returns:
            The heads' predictions in order, the final one last.
        """
        text_KD = self.class_embeddings if class_embeddings_KD is None else class_embeddings_KD
        mask_features, memory = self.pixel_decoder(self.backbone(images_B3HW))
        heads = self.decoder(mask_features, memory, attention_masks)
        found = []
        for queries, mask_logits in heads if all_heads else heads[-1:]:
            if self.classifier.reads_background:
                background = background_embedding(mask_features, mask_logits)
            else:
                background = queries.new_zeros(len(queries), queries.shape[2])
            found.append(HeadOutput(self.classifier(queries, background, text_KD), mask_logits, queries, background))
        return found

    def train(self, mode: bool = True) -> "D2Zero":
        """Put the model into training mode, in which its weights will not stay those of its file; or out of it."""
        if mode:
            self.checkpoint = ""
        return super().train(mode)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As torch's; the weights are no longer those of the model's file."""
        self.checkpoint = ""
        return super().load_state_dict(*arguments, **options)

    def segmenter(self) -> Segmenter:
        """The model behind the same interface as an exported one, in evaluation mode.

        It has the model's vocabulary of now; later changes of either's do not reach the other.
        """
        return Segmenter(TorchBackend(self), self.contract(), self.vocabulary, TorchClassifier(self))

    def with_decoder_layers(self, count: int) -> "D2Zero":
        """The model that stops after some of its decoder layers: each was trained with a head of its own.

        Args:
            count: How many of the first layers it keeps. Its output equals this model's head of that number.

        Raises:
            D2ZeroError: There are not so many.
        """
        layers = self.config.decoder_layers
        if not 1 <= count <= layers:
            raise D2ZeroError(f"decoder_layers must be 1 to {layers}, which the model has, got {count}")
        if count == layers:
            return self
        decoder = copy.deepcopy(self.decoder)
        decoder.layers = decoder.layers[:count]
        config = replace(self.config, decoder_layers=count)
        shorter = D2Zero(self.backbone, self.pixel_decoder, decoder, self.classifier, self.vocabulary, config)
        shorter.checkpoint = self.checkpoint
        return shorter.to(self.class_embeddings.device).train(self.training)

    def contract(self, **fields: Any) -> ModelContract:
        """What inference needs to know of the model.

        Args:
            fields: Fields of the contract to add or replace.
        """
        vocabulary = self.vocabulary
        known: dict[str, Any] = {
            "class_names": vocabulary.names,
            "seen": tuple(vocabulary.seen.tolist()),
            "active": tuple(vocabulary.active.tolist()),
            "vocabulary_source": vocabulary.source,
            "synonyms": vocabulary.synonyms,
            "text_dim": self.config.text_dim,
            "num_queries": self.config.num_queries,
            "decoder_layers": self.config.decoder_layers,
            "query_dim": self.config.hidden_dim,
            "preprocessing": self.config.preprocessing,
            "softmax_temperature": self.config.softmax_temperature,
            "checkpoint": self.checkpoint,
        }
        return ModelContract(**{**known, **fields})

    def predict_raw(self, images: Sequence[NDArray[np.uint8]]) -> RawOutput:
        """Normalise and pad images, run the network, resize nothing; see `Segmenter.predict_raw`."""
        with self._evaluating() as segmenter:
            return segmenter.predict_raw(images)

    def postprocess(
        self,
        out: RawOutput,
        input_sizes: Sequence[Size],
        output_sizes: Sequence[Size],
        mode: Mode | ModeName = Mode.GZSIS,
        **options: Any,
    ) -> list[Detections]:
        """Turn raw output into instances; see `Segmenter.postprocess`."""
        with self._evaluating() as segmenter:
            return segmenter.postprocess(out, input_sizes, output_sizes, mode, **options)

    def predict(
        self, images: Sequence[NDArray[np.uint8]], mode: Mode | ModeName = Mode.GZSIS, **options: Any
    ) -> list[Detections]:
        """Resize, run and post-process images of any size; results refer to the images as given."""
        with self._evaluating() as segmenter:
            return segmenter(list(images), mode, **options)

    @contextmanager
    def _evaluating(self) -> Iterator[Segmenter]:
        """A segmenter; the model's training mode is put back afterwards."""
        was_training = self.training
        try:
            yield self.segmenter()
        finally:
            self.train(was_training)

    def set_deformable(self, function: DeformableFunction | None) -> None:
        """Choose how deformable attention is computed (`d2zero.model.deformable`); results are equal.

        Args:
            function: The fastest where the tensors are if None.
        """
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.function = function


def build(config: ModelConfig, vocabulary: Vocabulary) -> D2Zero:
    """Compose a model with fresh weights."""
    backbone = Backbone(
        config.backbone, config.backbone_options, config.frozen_backbone_norm, config.backbone_output_norm
    )
    pixel_decoder = PixelDecoder(
        in_channels=backbone.channels,
        dim=config.hidden_dim,
        heads=config.num_heads,
        layers=config.encoder_layers,
        points=config.encoder_points,
        ffn_dim=config.encoder_ffn_dim,
    )
    decoder = MaskedDecoder(
        dim=config.hidden_dim,
        num_queries=config.num_queries,
        heads=config.num_heads,
        layers=config.decoder_layers,
        ffn_dim=config.decoder_ffn_dim,
    )
    return D2Zero(backbone, pixel_decoder, decoder, _classifier(config), vocabulary, config)


def _classifier(config: ModelConfig) -> SemanticClassifier | ClosedClassifier:
    if config.head == "closed":
        return ClosedClassifier(config.hidden_dim, config.text_dim)
    return SemanticClassifier(
        dim=config.hidden_dim,
        text_dim=config.text_dim,
        semantic_dim=config.semantic_dim,
        adaptation_layers=config.adaptation_layers,
        heads=config.adaptation_heads,
        ffn_dim=config.adaptation_ffn_dim,
        dropout=config.adaptation_dropout,
        logit_scale=config.logit_scale,
    )
