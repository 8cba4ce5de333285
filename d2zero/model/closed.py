"""The closed-vocabulary head: a linear layer with one output per class, and the no-object class last (Mask2Former).

Such a model has names and no text embeddings. In place of text embeddings are rows of the identity matrix: each says
which output is its class's. So one interface serves both heads, and a vocabulary may leave classes out or reorder them,
but cannot add any. It records a digest of the layer's class names, so that another layer's vocabulary is refused.

Letters: B batch, Q queries, K classes of a vocabulary, N classes of the layer, C hidden channels.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.vocabulary import CLOSED, LAYER_CLASSES

MOST_CLASSES = 4096  # the identity matrix is in every checkpoint


class ClosedClassifier(nn.Module):
    """Class logits from queries only.

    Args:
        dim: Hidden channels C.
        classes: N.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes + 1)

    reads_background = False

    def forward(self, queries_BQC: Tensor, background_BC: Tensor, class_embeddings_KN: Tensor) -> Tensor:
        """Class logits (B, Q, K + 1), float32, no-object last.

        Args:
            queries_BQC: Normalised query features.
            background_BC: Not used.
            class_embeddings_KN: Rows of the identity matrix, as `closed_vocabulary` makes them.
        """
        logits_BQN = self.linear(queries_BQC).float()
        classes_BQK = logits_BQN[..., :-1] @ class_embeddings_KN.T.float()
        return torch.cat([classes_BQK, logits_BQN[..., -1:]], dim=-1)


def closed_vocabulary(names: Sequence[str]) -> Vocabulary:
    """The vocabulary of a closed model.

    Args:
        names: One name per output of its linear layer, in order, without no-object.

    Raises:
        D2ZeroError: A name is empty or given twice, or there are none or too many.
    """
    if len(names) > MOST_CLASSES:
        raise D2ZeroError(f"a closed-vocabulary model has at most {MOST_CLASSES} classes, got {len(names)}")
    identity = np.eye(len(names), dtype=np.float32)
    digest = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
    return Vocabulary(tuple(names), identity, source={"encoder": CLOSED, LAYER_CLASSES: digest})
