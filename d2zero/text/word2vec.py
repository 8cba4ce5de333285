"""Vocabularies from the published word2vec files.

A file has D = 300 rows and 1 + K comma-separated columns: an unused background vector, then the classes in
the split's order.
"""

import warnings
from pathlib import Path

import numpy as np

from d2zero.data.splits import Split
from d2zero_runtime import D2ZeroError, Vocabulary

WIDTH = 300  # values of a word2vec vector
NORM = 0.76663  # of every vector in the published files


def read_word2vec(path: Path, split: Split) -> Vocabulary:
    """Read a published embedding file as the vocabulary of a split.

    Raises:
        D2ZeroError: The file is absent, is no table of numbers, or belongs to another split.
    """
    if not path.is_file():
        raise D2ZeroError(f"embedding file {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty file, refused below
            table_DK = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise D2ZeroError(f"{path} is not a table of comma-separated numbers: {error}") from error
    if not table_DK.size:
        raise D2ZeroError(f"{path} is empty")
    expected = 1 + len(split.names)
    if table_DK.shape[1] != expected:
        raise D2ZeroError(
            f"{path} has {table_DK.shape[1]} columns, split {split.name} needs {expected}"
            f" (an unused background vector, {len(split.seen)} seen and {len(split.unseen)} unseen classes);"
            " is it the file of another split?"
        )
    if len(table_DK) != WIDTH:
        raise D2ZeroError(f"{path} has {len(table_DK)} rows, a word2vec file has {WIDTH}; was it cut short?")
    return Vocabulary(
        names=split.names,
        embeddings=table_DK[:, 1:].T,
        seen=np.array(split.is_seen(split.names)),
        source={"encoder": "word2vec", "split": split.name},
    )
