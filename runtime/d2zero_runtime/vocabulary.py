"""A vocabulary: the classes that a model is asked about, as names and text embeddings.

Every class attends to every other in the semantic classifier, so adding a name shifts all scores. A
vocabulary therefore has a *context* (all its names) and an *active* subset (the names that may be
predicted). On disk it is a `.npz` without pickles, readable without torch.

Letters: K classes, D text width.
"""

import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.errors import D2ZeroError, join_truncated
from d2zero_runtime.files import atomic_write

FORMAT_VERSION = 1
CLOSED = "closed"  # in place of a text encoder's name: one row for each output of a model's linear layer
LAYER_CLASSES = "layer_classes"  # in the source of a closed vocabulary: a digest of the layer's class names


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary:
    """Names, embeddings and flags of K classes.

    Args:
        names: K distinct, non-empty class names.
        embeddings: (K, D) float32 text embeddings, one row per name, finite and not all zero.
        seen: (K,) bool, True for classes that training saw. All seen if left out.
        active: (K,) bool, True for classes that may be predicted. All active if left out.
        source: Where the embeddings come from, such as `{"encoder": "word2vec"}`. Vocabularies of
            different encoders do not mix.
        synonyms: Other words for a class, `{"couch": "sofa"}`; both are names. The probability of a synonym
            counts for its class, and only the class is reported; flags of a synonym are those of its class.

    Raises:
        D2ZeroError: A field has the wrong shape or holds values that cannot be used.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    seen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    active: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    source: dict[str, Any] = field(default_factory=dict)
    synonyms: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.names)
        names = tuple(str(name) for name in self.names)  # NumPy's texts become Python's
        embeddings = _floats(self.embeddings)
        count = len(names)
        _check_embeddings(names, embeddings)
        if self.encoder == CLOSED:
            _check_one_hot(names, embeddings)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "embeddings", embeddings)
        _check_synonyms(self.synonyms, names)
        object.__setattr__(self, "class_of", _class_of(names, self.synonyms))
        object.__setattr__(self, "seen", _flags("seen", self.seen, count)[self.class_of])
        object.__setattr__(self, "active", _flags("active", self.active, count)[self.class_of])
        if not self.active.any():
            raise D2ZeroError("a vocabulary needs at least one active class, got none")

    class_of: NDArray[np.int64] = field(init=False)
    """(K,) the row of each name's class: its own, except for synonyms."""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Vocabulary: {len(self)} classes of width {self.width} ({join_truncated(self.names)})>"

    @property
    def width(self) -> int:
        """The text width D."""
        return int(self.embeddings.shape[1])

    @property
    def encoder(self) -> str:
        """The name of the text encoder, or an empty string if it was not recorded."""
        return str(self.source.get("encoder", ""))

    @property
    def layer_classes(self) -> str:
        """Of a closed vocabulary, a digest of the names of its model's outputs; else an empty string."""
        return str(self.source.get(LAYER_CLASSES, ""))

    @property
    def split(self) -> str:
        """The name of the split that says which classes are seen, or an empty string if it was not recorded."""
        return str(self.source.get("split", ""))

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Classes that training saw, in order."""
        return self._classes(self.seen)

    @property
    def unseen_names(self) -> tuple[str, ...]:
        """Classes that training never saw, in order."""
        return self._classes(~self.seen)

    def _classes(self, flags: NDArray[np.bool_]) -> tuple[str, ...]:
        chosen = zip(self.names, flags, strict=True)
        return tuple(name for name, flag in chosen if flag and name not in self.synonyms)

    def with_active(self, names: Sequence[str]) -> "Vocabulary":
        """Keep the whole context and let only `names` (or what they are synonyms of) be predicted."""
        self._require(names)
        chosen = {self.synonyms.get(name, name) for name in names}
        return replace(self, active=np.isin(np.array(self.names), list(chosen)))

    def with_synonyms(self, synonyms: Mapping[str, str]) -> "Vocabulary":
        """Count some names as other words for a class: `{"couch": "sofa"}`.

        Raises:
            D2ZeroError: A word or its class is no name of this vocabulary, or the class is a synonym itself.
        """
        return replace(self, synonyms=dict(synonyms))

    def select(self, names: Sequence[str]) -> "Vocabulary":
        """Keep only `names`, in that order: a smaller context, which changes every score."""
        self._require(names)
        row_of, kept = {name: row for row, name in enumerate(self.names)}, set(names)
        rows = [row_of[name] for name in names]
        return replace(
            self,
            names=tuple(names),
            embeddings=self.embeddings[rows],
            seen=self.seen[rows],
            active=self.active[rows],
            synonyms={word: name for word, name in self.synonyms.items() if {word, name} <= kept},
        )

    def with_classes(self, other: "Vocabulary") -> "Vocabulary":
        """Add the classes of another vocabulary; one that is there gets the other's embedding and keeps its flags.

        Raises:
            D2ZeroError: The embeddings are another encoder's, or of another width.
        """
        check_vocabulary(other, self.width, self)
        row_of, own = {name: row for row, name in enumerate(other.names)}, set(self.names)
        new = [name for name in other.names if name not in own]
        rows = [row_of[name] for name in new]
        embeddings = self.embeddings.copy()
        for row, name in enumerate(self.names):
            if name in row_of:
                embeddings[row] = other.embeddings[row_of[name]]
        return replace(
            self,
            names=(*self.names, *new),
            embeddings=np.concatenate([embeddings, other.embeddings[rows]]),
            seen=np.append(self.seen, other.seen[rows]),
            active=np.append(self.active, other.active[rows]),
            synonyms={**{word: name for word, name in other.synonyms.items() if word in new}, **self.synonyms},
        )

    def _require(self, names: Sequence[str]) -> None:
        known = set(self.names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise D2ZeroError(
                f"{join_truncated(unknown)} not in the vocabulary; it has {join_truncated(self.names, 10)}"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vocabulary as `.npz`, atomically, and return its path."""
        path = Path(path)
        if path.suffix != ".npz":
            raise D2ZeroError(f"a vocabulary is saved as .npz, got {path.name!r}")
        with atomic_write(path) as partial, partial.open("wb") as stream:
            np.savez_compressed(
                stream,
                format_version=np.array(FORMAT_VERSION),
                names=np.array(self.names),
                embeddings=self.embeddings,
                seen=self.seen,
                active=self.active,
                source=np.array(json.dumps(self.source)),
                synonyms=np.array(json.dumps(self.synonyms)),
            )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Read a `.npz` written by `save`.

        Raises:
            D2ZeroError: The file is absent, is not a vocabulary, or is of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise D2ZeroError(f"vocabulary {path} does not exist; make one with `d2zero vocab --help`")
        fields = _members(path)
        missing = {"format_version", "names", "embeddings", "seen", "active", "source"} - fields.keys()
        if missing:
            raise D2ZeroError(f"{path} is not a vocabulary: it lacks {join_truncated(sorted(missing))}")
        for name, (kinds, dims) in _MEMBERS.items():
            if name in fields and (fields[name].dtype.kind not in kinds or fields[name].ndim != dims):
                raise D2ZeroError(f"{path} is damaged: {name} is {fields[name].dtype} of shape {fields[name].shape}")
        refuse_newer(int(fields["format_version"]), FORMAT_VERSION, str(path), "the vocabulary's format")
        source, synonyms = (
            parse_object(str(fields.get(name, "{}")), f"{path}: {name}") for name in ("source", "synonyms")
        )
        try:
            return cls(
                names=tuple(fields["names"].tolist()),
                embeddings=fields["embeddings"],
                seen=fields["seen"],
                active=fields["active"],
                source=source,
                synonyms=checked(dict[str, str], synonyms, "synonyms"),
            )
        except D2ZeroError as error:
            raise D2ZeroError(f"{path}: {error}") from error


LARGEST_FILE = 1 << 30  # bytes of a vocabulary's arrays: half a million classes of CLIP's width
_MEMBERS = {  # kinds of NumPy's types, and dimensions
    "format_version": ("iu", 0),
    "names": ("U", 1),
    "embeddings": ("fiu", 2),
    "seen": ("b", 1),
    "active": ("b", 1),
    "source": ("U", 0),
    "synonyms": ("U", 0),
}


def _members(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a vocabulary's file.

    Raises:
        D2ZeroError: It is none, is damaged, or its arrays are larger than any vocabulary's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_FILE:
            raise D2ZeroError(
                f"{path} holds {size / 1e9:.1f} GB of arrays, a vocabulary at most {LARGEST_FILE / 1e9:.1f}"
            )
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name in _MEMBERS}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("one of its members is no array")
        return found
    except D2ZeroError:
        raise
    except Exception as error:  # NumPy's, zip's and zlib's, of many kinds, for a damaged file
        if isinstance(error, zipfile.BadZipFile) and _is_one_array(path):
            error = ValueError("it holds one array; make a vocabulary of it with `d2zero vocab npy`")
        raise D2ZeroError(f"{path} is not a vocabulary (.npz) or is damaged: {damage(error)}") from error


def damage(error: Exception) -> str:
    """Why NumPy cannot read a file, in one line; its advice to allow pickles is not passed on."""
    text = str(error) or type(error).__name__
    return "it is not a NumPy file" if "pickle" in text else text.splitlines()[0]


def _is_one_array(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(6) == b"\x93NUMPY"


def check_vocabulary(
    vocabulary: Vocabulary, text_dim: int, previous: Vocabulary | None = None, closed: bool = False
) -> None:
    """Refuse a vocabulary that a model cannot use.

    Args:
        vocabulary: The classes.
        text_dim: The width that the model reads.
        previous: The model's own classes, if it has some.
        closed: Whether the model is known to be closed, where it has none yet.

    Raises:
        D2ZeroError: Its width or its encoder differs from the model's, or it is another closed model's.
    """
    trained_with = previous.encoder if previous else CLOSED if closed else ""
    check_encoder(vocabulary.width, vocabulary.encoder, text_dim, trained_with)
    if previous and trained_with == CLOSED and vocabulary.layer_classes != previous.layer_classes:
        raise D2ZeroError(
            f"the vocabulary is that of another closed model with {text_dim} classes, in which other outputs have these"
            " names; choose among the model's own by `select` or `with_active`"
        )


def check_encoder(width: int, encoder: str, text_dim: int, trained_with: str, what: str = "the vocabulary") -> None:
    """Refuse embeddings that a model cannot use.

    Args:
        width: Theirs.
        encoder: Theirs, or an empty string if it is not known.
        text_dim: The width that the model reads.
        trained_with: The encoder that the model was trained with, or an empty string.
        what: What they are of, for the message.

    Raises:
        D2ZeroError: Width or encoder differ.
    """
    if trained_with == CLOSED and (encoder != CLOSED or width != text_dim):
        raise D2ZeroError(
            f"the model has a closed vocabulary, the {text_dim} classes that it was trained on, and reads no text, but"
            f" {what} has others (encoder {encoder or 'unknown'}); choose among its own by `select` or `with_active`"
        )
    if width != text_dim:
        raise D2ZeroError(
            f"the model reads class embeddings of width {text_dim}, {what} has {width}"
            f" (encoder {encoder or 'unknown'}); use the encoder that the model was trained with"
            f"{f', {trained_with}' if trained_with else ''}"
        )
    if trained_with and encoder and trained_with != encoder:
        raise D2ZeroError(
            f"the model was trained with embeddings of {trained_with}, {what} has those of {encoder}, and the two do"
            f" not mix; make them with {trained_with} (`d2zero vocab --help`)"
        )


def _floats(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    array = np.asarray(embeddings)
    if array.dtype.kind not in "fiu":
        raise D2ZeroError(f"embeddings must be numbers, got {array.dtype}")
    with np.errstate(over="ignore"):  # infinity is refused
        return np.ascontiguousarray(array, dtype=np.float32)


def check_names(names: tuple[str, ...]) -> None:
    """Refuse what cannot be a vocabulary's names.

    Raises:
        D2ZeroError: There are none, or one is empty, given twice, or no text.
    """
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise D2ZeroError(f"class names must be texts, got {wrong!r}")
    if not names:
        raise D2ZeroError("a vocabulary needs at least one class name, got none")
    if any(not name.strip() for name in names):
        raise D2ZeroError(f"class names must not be empty; number {[n.strip() for n in names].index('')} is")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise D2ZeroError(f"class names must be distinct, {join_truncated(repeated)} given more than once")


def _check_embeddings(names: tuple[str, ...], embeddings: NDArray[np.float32]) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(names) or embeddings.shape[1] == 0:
        raise D2ZeroError(
            f"embeddings must have shape (K={len(names)}, D), one row per class name, got {embeddings.shape}"
        )
    broken = [names[row] for row in np.flatnonzero(~np.isfinite(embeddings).all(axis=1))]
    if broken:
        raise D2ZeroError(f"embeddings hold NaN or infinity for {join_truncated(broken)}; compute them again")
    empty = [names[row] for row in np.flatnonzero(~embeddings.any(axis=1))]
    if empty:
        raise D2ZeroError(f"embeddings are all zero for {join_truncated(empty)}; the encoder did not know these names")


def _check_one_hot(names: tuple[str, ...], embeddings: NDArray[np.float32]) -> None:
    one_hot = ((embeddings == 0) | (embeddings == 1)).all(axis=1) & (embeddings.sum(axis=1) == 1)
    if not one_hot.all():
        broken = [names[row] for row in np.flatnonzero(~one_hot)]
        raise D2ZeroError(
            "in a closed vocabulary, one element of each row is 1, the others are 0, and it says which output is the"
            f" class's; not so for {join_truncated(broken)}"
        )


def random_embeddings(random: np.random.Generator, classes: int, own: Vocabulary) -> NDArray[np.float32]:
    """Random rows (`classes`, D) that a model of these own classes can be given, to compare or to measure it."""
    if own.encoder == CLOSED:
        return np.eye(own.width, dtype=np.float32)[random.integers(own.width, size=classes)]
    return random.standard_normal((classes, own.width)).astype(np.float32)


def _check_synonyms(synonyms: Mapping[str, str], names: tuple[str, ...]) -> None:
    unknown = sorted({word for pair in synonyms.items() for word in pair} - set(names))
    if unknown:
        raise D2ZeroError(
            f"synonyms and their classes must be names of the vocabulary (each with an embedding),"
            f" {join_truncated(unknown)}"
            " not among them"
        )
    chained = [name for name in synonyms.values() if name in synonyms]
    if chained:
        raise D2ZeroError(f"a synonym must stand for a class, {join_truncated(chained)} stands for another itself")


def _class_of(names: tuple[str, ...], synonyms: Mapping[str, str]) -> NDArray[np.int64]:
    row_of = {name: row for row, name in enumerate(names)}
    return np.array([row_of[synonyms.get(name, name)] for name in names], np.int64)


def _flags(what: str, flags: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    flags = np.asarray(flags)
    if flags.size and flags.dtype.kind != "b":
        raise D2ZeroError(f"{what} must be true or false for each class, got {flags.dtype}")
    if flags.size == 0:
        return np.ones(count, bool)
    if flags.shape != (count,):
        raise D2ZeroError(f"{what} must have shape ({count},), one flag per class, got {flags.shape}")
    return flags
