"""A CLIP text encoder that `d2zero export-text` wrote: class names typed at run time become a vocabulary.

Letters: P prompts, L context length, D text width.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.text_encoder import TextContract
from d2zero_runtime.backends.onnxruntime import TextSession
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.formats import Providers, onnxruntime_providers
from d2zero_runtime.text.prompts import Progress, embed_names
from d2zero_runtime.text.tokenizer import ClipTokenizer
from d2zero_runtime.vocabulary import Vocabulary


class TextEncoder:
    """Makes vocabularies of class names. May be called from several threads.

    Args:
        session: Runs the network.
        contract: What the file says about itself.
        tokenizer: Makes token ids of prompts.
    """

    def __init__(self, session: TextSession, contract: TextContract, tokenizer: ClipTokenizer) -> None:
        self._session, self.contract, self._tokenizer = session, contract, tokenizer

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], providers: Providers | None = None, threads: int | None = None
    ) -> "TextEncoder":
        """Load a text encoder.

        Args:
            path: An `.onnx` file, made by `d2zero export-text`.
            providers: `cpu` (the default), `cuda`, `tensorrt` or ONNX Runtime's own names, as in `load`.
            threads: Threads inside an operator; ONNX Runtime's choice if left out.

        Raises:
            D2ZeroError: The file cannot be used, a provider is not available, or a package is not installed.
        """
        path = Path(path)
        contract = TextContract.read(path)
        chosen = onnxruntime_providers(providers, f"{path} is a text encoder")
        tokenizer = ClipTokenizer(contract.tokenizer, contract.context_length, str(path))
        return cls(TextSession(path, chosen, threads), contract, tokenizer)

    def __repr__(self) -> str:
        return f"<TextEncoder: {self.encoder} of width {self.width}, {self._session.name}>"

    @property
    def encoder(self) -> str:
        """The encoder's name, which its vocabularies record."""
        return self.contract.encoder

    @property
    def width(self) -> int:
        """The text width D."""
        return self.contract.width

    def __call__(
        self, names: Sequence[str], seen: Collection[str] | None = None, progress: Progress | None = None
    ) -> Vocabulary:
        """A vocabulary of class names.

        Args:
            names: Class names; `cat|kitty` are synonyms, over which the embedding is averaged, and the first of which
                names the class.
            seen: Names of classes that training saw, such as `segmenter.vocabulary.seen_names`: the other classes are
                unseen. All are seen if left out, as in `Vocabulary`.
            progress: Shows how far it has come.

        Raises:
            D2ZeroError: The names cannot be those of a vocabulary, or the network cannot be run.
        """
        if isinstance(names, str):
            raise D2ZeroError(f"names must be a list such as ['cat', 'dog'], got the text {names!r}")
        return embed_names(names, self.encode, self.encoder, self.contract.templates, seen, progress)

    def tokenize(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids of texts, (P, L) int64."""
        return self._tokenizer(prompts)

    def encode(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Features of texts as they are, without templates, in one run: (P, D) float32, L2-normalised."""
        features_PD = self._session.encode(self.tokenize(prompts))
        if features_PD.shape != (len(prompts), self.width):
            raise D2ZeroError(
                f"the text encoder made features of shape {features_PD.shape}, expected"
                f" {(len(prompts), self.width)}; export it again"
            )
        return features_PD
