"""CLIP's tokenizer without torch and open_clip: their cleaning, then the `tokenizers` library.

Equal to open_clip's `SimpleTokenizer` for all letters that the library's Unicode tables know, those of Unicode 14 at
least. A text that contains one of its control words is refused here; there it would become that word's token.
"""

from collections.abc import Sequence
from html import unescape

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError, optional

START, END = "<start_of_text>", "<end_of_text>"


class ClipTokenizer:
    """Texts as token ids.

    Args:
        content: JSON of the `tokenizers` library.
        context_length: Tokens per text: longer ones are cut, and keep their end; shorter ones are filled with 0.
        where: The file, for error messages.

    Raises:
        D2ZeroError: A package is not installed, or the JSON is no tokenizer.
    """

    def __init__(self, content: str, context_length: int, where: str) -> None:
        self._fix_text = optional("ftfy").fix_text
        library = optional("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_str(content)
            self._tokenizer.enable_truncation(context_length)
            self._tokenizer.enable_padding(length=context_length, pad_id=0)
        except Exception as error:  # the library raises plain ones
            reason = str(error).splitlines()[0]
            raise D2ZeroError(f"{where} is damaged: its tokenizer cannot be read ({reason})") from error
        self._shape = (context_length,)
        self._where = where

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids, (texts, context length) int64.

        Raises:
            D2ZeroError: A text contains a control word, or the tokenizer cannot read it.
        """
        rows = []
        for text in texts:
            cleaned = self.cleaned(text)
            if START in cleaned or END in cleaned:
                raise D2ZeroError(f"names must not contain {START} or {END}, which control the encoder, got {text!r}")
            try:
                rows.append(np.array(self._tokenizer.encode(cleaned).ids, np.int64))
            except Exception as error:  # the library's, or NumPy's for what is no id
                raise D2ZeroError(f"{self._where} is damaged: its tokenizer cannot read {text!r}") from error
            if rows[-1].shape != self._shape:
                raise D2ZeroError(f"{self._where} is damaged: its tokenizer makes {len(rows[-1])} tokens of {text!r}")
        return np.stack(rows) if rows else np.zeros((0, *self._shape), np.int64)

    def cleaned(self, text: str) -> str:
        """A text as open_clip cleans it: repaired, without HTML's entities, single spaces, lower case."""
        return " ".join(unescape(unescape(self._fix_text(text))).split()).lower()
