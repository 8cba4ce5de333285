"""The semantic classifier: queries against class text, adapted to the image (D2Zero §3.2–3.3).

Queries and class embeddings meet in one space. The image's own background, averaged from the mask
features, is appended as the last "class". Input-conditional adaptation lets all classes attend to each
other and to the queries before they are compared.

Letters: B batch, Q queries, K classes, C hidden channels, D text width, E semantic width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_FLOOR = 1e-5  # clamp of the background's norm


class SemanticClassifier(nn.Module):
    """Class logits from queries, the image's background and class embeddings.

    Args:
        dim: Hidden channels C.
        text_dim: Text width D.
        semantic_dim: E.
        adaptation_layers: Transformer decoder layers with text as target and queries as memory; 0 for none.
        heads: Attention heads of the adaptation.
        ffn_dim: Feed-forward width of the adaptation.
        dropout: Dropout of the adaptation, in training only.
        logit_scale: Frozen factor on the cosines.
    """

    logit_scale: Tensor
    reads_background = True

    def __init__(
        self,
        dim: int = 256,
        text_dim: int = 300,
        semantic_dim: int = 512,
        adaptation_layers: int = 1,
        heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.query_projection = nn.Linear(dim, semantic_dim)
        self.text_projection = nn.Linear(text_dim, semantic_dim)
        self.background_projection = nn.Linear(dim, semantic_dim)
        self.adaptation: nn.TransformerDecoder | None = None
        if adaptation_layers:
            layer = nn.TransformerDecoderLayer(semantic_dim, heads, ffn_dim, dropout, batch_first=True)
            self.adaptation = nn.TransformerDecoder(layer, adaptation_layers, nn.LayerNorm(semantic_dim))
            for parameter in self.adaptation.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))

    def forward(self, queries_BQC: Tensor, background_BC: Tensor, class_embeddings_KD: Tensor) -> Tensor:
        """Classify.

        Args:
            queries_BQC: Normalised query features.
            background_BC: What `background_embedding` makes of the same images.
            class_embeddings_KD: Classes to compare with.

        Returns:
            Class logits (B, Q, K + 1), float32, the background last.
        """
        queries_BQE = F.normalize(self.query_projection(queries_BQC), dim=-1)
        text_KE = self.text_projection(class_embeddings_KD)
        background_B1E = self.background_projection(background_BC)[:, None]
        text_BKE = torch.cat([text_KE.expand(len(queries_BQE), -1, -1), background_B1E], dim=1)
        text_BKE = F.normalize(text_BKE, dim=-1)
        if self.adaptation is not None:
            text_BKE = F.normalize(self.adaptation(text_BKE, queries_BQE), dim=-1)
        with torch.autocast(queries_BQE.device.type, enabled=False):
            logits_BQK: Tensor = self.logit_scale * (queries_BQE.float() @ text_BKE.float().transpose(1, 2))
            return logits_BQK


def background_embedding(mask_features_BCHW: Tensor, mask_logits_BQHW: Tensor) -> Tensor:
    """The mean mask feature of what no query claims, L2-normalised: (B, C), without gradient.

    The mean runs over all pixels, those of the background counting and the others zero. An image whose
    every pixel is claimed uses every pixel. The published code decides that over the whole batch, so that
    images of a batch influence each other; here each image decides for itself (equal at batch 1).
    """
    with torch.no_grad():
        features = mask_features_BCHW.float() * background(mask_logits_BQHW)[:, None]
        return F.normalize(features.mean(dim=(2, 3)), dim=-1, eps=NORM_FLOOR)


def background(mask_logits_BQHW: Tensor) -> Tensor:
    """Pixels that no query claims, (B, H, W) bool; all pixels of an image that has none."""
    background_BHW = ~(mask_logits_BQHW > 0).any(dim=1)
    return background_BHW | ~background_BHW.flatten(1).any(dim=1)[:, None, None]
