"""A CLIP text encoder of open_clip → ONNX, in named stages: load, tokenizer, trace, verify.

The graph takes token ids and returns L2-normalised features; the tokenizer, the prompts and the encoder's name are in
the file's metadata, so that the runtime needs neither torch nor open_clip.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.export import Dim

from d2zero.text.clip import Clip, load_clip
from d2zero_export.onnx_export import tools
from d2zero_export.onnx_graph import OPSET, check_graph, translate
from d2zero_runtime import D2ZeroError, TextEncoder
from d2zero_runtime.artifacts.text_encoder import FEATURES_OUTPUT, TEXT_KEY, TOKENS_INPUT, TextContract
from d2zero_runtime.errors import optional
from d2zero_runtime.files import atomic_write, file_hash
from d2zero_runtime.text.prompts import TEMPLATES, embed_names
from d2zero_runtime.text.tokenizer import END, START

LARGEST = 2_000_000_000  # bytes of weights: a protocol-buffers message has at most 2 GiB
MAX_DIFFERENCE = 1e-5  # of embeddings, whose rows have length 1
_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # SimpleTokenizer's, without control words
_NAMES = ["cat", "red mug", "sofa|couch", "traffic light, stoplight", "T-shirt & jeans", "Café Müller's", "木の椅子 🪑"]
_TEXTS = ["", "1234 12a3 a_b-c/d", "don't &amp;amp; they'LL", "schÃ¶n “quoted” …", "e\u0301 ﬁn", "a " * 200, "x" * 300]


def export_text_encoder(
    architecture: str, weights: Path, output: Path, stage: Callable[[str], None] = lambda name: None
) -> float:
    """Export the text encoder of a CLIP model.

    Args:
        architecture: As open_clip names it.
        weights: Its weights; loaded without executing pickled code.
        output: Ends in `.onnx`. Written only if every stage passed.
        stage: Told each stage's name as it begins.

    Returns:
        The largest difference between embeddings of names by the file and by open_clip.

    Raises:
        D2ZeroError: The model cannot be loaded or exported, or the file differs from it.
    """
    if output.suffix != ".onnx":
        raise D2ZeroError(f"the text encoder must end in .onnx, got {output.name!r}")
    _require_own_tokenizer(architecture)
    stage("load")
    clip = load_clip(architecture, weights)
    _require_small(clip)
    stage("tokenizer")
    tokenizer = tokenizer_json(clip)
    stage("trace")
    proto = _graph(clip)
    contract = TextContract(
        encoder=clip.encoder,
        templates=TEMPLATES,
        context_length=clip.tokenizer.context_length,
        width=clip.encode(["cat"]).shape[1],
        tokenizer=tokenizer,
        opset=OPSET,
        weights=file_hash(weights),
        tools=tools("torch", "onnx", "onnxscript", "open_clip_torch", "tokenizers", "ftfy"),
    )
    proto.metadata_props.append(onnx.StringStringEntryProto(key=TEXT_KEY, value=contract.to_json()))
    check_graph(proto)
    with atomic_write(output) as candidate:
        candidate.write_bytes(proto.SerializeToString())
        stage("verify")
        return _verified(clip, TextEncoder.load(candidate))


class _TextTower(torch.nn.Module):
    """Token ids (P, L) → L2-normalised features (P, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip: Any = clip.model

    def forward(self, token_ids_PL: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_text(token_ids_PL)
        return torch.nn.functional.normalize(features.float(), dim=-1)


def _graph(clip: Clip) -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.export.export(
            _TextTower(clip).eval(),
            (clip.tokenizer(["a cat", "the dog"]),),
            dynamic_shapes=({0: Dim("prompts", min=1, max=65536)},),
            strict=False,
        )
    proto = translate(program, [TOKENS_INPUT], [FEATURES_OUTPUT])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "prompts"
    return proto


def tokenizer_json(clip: Clip) -> str:
    """CLIP's tokenizer for the `tokenizers` library, which `ClipTokenizer` reads.

    Raises:
        D2ZeroError: The model's tokenizer is another one.
    """
    library, source = optional("tokenizers"), clip.tokenizer
    ids = getattr(source, "encoder", {})
    if [ids.get(word) for word in (START, END)] != getattr(source, "all_special_ids", None):
        raise D2ZeroError(_other_tokenizer(clip.name))
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    made = library.Tokenizer(library.models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(_PATTERN), behavior="removed", invert=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = library.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(word, ids[word]) for word in (START, END)]
    )
    content: str = made.to_str()
    return content


def _require_own_tokenizer(architecture: str) -> None:
    """Before anything is loaded: open_clip fetches the tokenizers of other text encoders from the network."""
    config = optional("open_clip").get_model_config(architecture) or {}
    text = config.get("text_cfg", {})
    if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        raise D2ZeroError(_other_tokenizer(architecture))


def _other_tokenizer(architecture: str) -> str:
    return (
        f"the text encoder of {architecture} has a tokenizer other than CLIP's own, and cannot be exported; make"
        " vocabularies of it with `d2zero vocab clip`"
    )


def _require_small(clip: Clip) -> None:
    parameters = clip.model.named_parameters()
    size = sum(value.nbytes for name, value in parameters if not name.startswith(("visual.", "text_decoder.")))
    if size > LARGEST:
        raise D2ZeroError(
            f"the text encoder of {clip.name} has {size / 1e9:.1f} GB of weights, an .onnx file holds at most"
            f" {LARGEST / 1e9:.0f}; make vocabularies of it with `d2zero vocab clip`"
        )


def _verified(clip: Clip, exported: TextEncoder) -> float:
    """The largest difference of embeddings.

    Raises:
        D2ZeroError: It is too large, or tokens differ.
    """
    texts = [*_TEXTS, *_NAMES, *(template.format(name) for template in TEMPLATES for name in _NAMES)]
    expected, found = clip.tokenizer(texts).numpy(), exported.tokenize(texts)
    different = [
        text for text, left, right in zip(texts, expected, found, strict=True) if not np.array_equal(left, right)
    ]
    if different:
        raise D2ZeroError(f"the exported tokenizer differs from that of {clip.name}, first in {different[0]!r}")
    reference = embed_names(_NAMES, clip.encode, clip.encoder).embeddings
    difference = float(np.abs(exported(_NAMES).embeddings - reference).max())
    if not difference <= MAX_DIFFERENCE:
        raise D2ZeroError(
            f"embeddings by the exported text encoder differ by {difference:.1e} from open_clip's, the limit is"
            f" {MAX_DIFFERENCE:.0e}"
        )
    return difference
