"""What an exported text encoder says about itself: JSON under `d2zero_text` in the file's metadata."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from d2zero_runtime.artifacts.onnx import read_metadata
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.errors import D2ZeroError

TEXT_KEY = "d2zero_text"
TEXT_VERSION = 1
TOKENS_INPUT, FEATURES_OUTPUT = "token_ids", "features"
LONGEST_CONTEXT = 4096  # tokens


@dataclass(frozen=True)
class TextContract:
    """All that encoding names needs to know beside the weights.

    Args:
        encoder: The encoder's name in vocabularies, such as `clip:ViT-B-16`.
        templates: Prompts with `{}` for the name.
        context_length: Tokens per text.
        width: D, of the features.
        tokenizer: JSON of the `tokenizers` library; texts are cleaned before it, as `ClipTokenizer` does.
        opset: ONNX's version.
        weights: SHA-256 of the weights' file.
        tools: Versions of what made the file.
        version: The version of this format.
    """

    encoder: str
    templates: tuple[str, ...]
    context_length: int
    width: int
    tokenizer: str
    opset: int = 18
    weights: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    version: int = TEXT_VERSION

    def __post_init__(self) -> None:
        if not self.encoder:
            raise D2ZeroError("encoder must not be empty")
        if not self.templates or not all("{}" in template for template in self.templates):
            raise D2ZeroError("templates must be texts with {} for the name, at least one")
        if not 3 <= self.context_length <= LONGEST_CONTEXT:
            raise D2ZeroError(f"context_length must be from 3 to {LONGEST_CONTEXT}, got {self.context_length}")
        if self.width < 1:
            raise D2ZeroError(f"width must be at least 1, got {self.width}")

    def to_json(self) -> str:
        """For the file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "TextContract":
        """Read and check what `to_json` wrote.

        Raises:
            D2ZeroError: It is damaged, of a newer version, or lacks a field.
        """
        described = f"{where}: the text encoder's description"
        values = parse_object(text, described)
        refuse_newer(values.get("version", 0), TEXT_VERSION, where, "the text encoder's format")
        return checked(cls, values, described, remedy="export it again")

    @classmethod
    def read(cls, path: Path) -> "TextContract":
        """The description inside a file, read without its weights.

        Raises:
            D2ZeroError: The file is absent, damaged, or no text encoder that d2zero exported.
        """
        if not path.is_file():
            raise D2ZeroError(f"text encoder {path} does not exist; make one with `d2zero export-text`")
        text = read_metadata(path, TEXT_KEY)
        if text is None:
            raise D2ZeroError(f"{path} is no text encoder of d2zero; make one with `d2zero export-text`")
        return cls.from_json(text, str(path))
