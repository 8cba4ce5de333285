"""`d2zero vocab`: vocabularies from embedding files or text, and what is in one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from d2zero.cli.terminal import tracked
from d2zero_runtime import D2ZeroError, TextEncoder, Vocabulary
from d2zero_runtime.files import check_output
from d2zero_runtime.formats import format_of, is_exported, read_exported

app = typer.Typer(help="Make and look at vocabularies: class names with their text embeddings.", no_args_is_help=True)
Output = Annotated[Path, typer.Option("--output", "-o", help="The vocabulary to write (.npz).")]
NAMES = "'cat, dog', or a .txt or .json file of names; synonyms as 'sofa|couch'."
SplitName = Annotated[
    str | None, typer.Option("--split", help="coco-48-17, coco-65-15 or a file (.yaml, .json): which classes are seen.")
]
Unseen = Annotated[
    str | None,
    typer.Option(
        "--unseen",
        help="Classes that training will not see: 'a, b', or a .txt or .json file, which names with commas need.",
    ),
]


@app.command()
def word2vec(
    file: Annotated[Path, typer.Argument(help="A published file: 300 rows, 1 + K comma-separated columns.")],
    output: Output,
    split: Annotated[str, typer.Option("--split", help="coco-48-17 or coco-65-15.")],
) -> None:
    """Make a vocabulary from a published word2vec file."""
    from d2zero.data.splits import find_split
    from d2zero.text.word2vec import read_word2vec

    _write(read_word2vec(file, find_split(split)), output)


@app.command()
def npy(
    file: Annotated[Path, typer.Argument(help="A (K, D) array, one row per class.")],
    output: Output,
    names: Annotated[
        str, typer.Option("--names", help="A .txt or .json file of K names, 'a, b, c', or 'coco' for COCO's 80.")
    ],
    split: SplitName = None,
    unseen: Unseen = None,
    encoder: Annotated[
        str,
        typer.Option("--encoder", help="Their text encoder; vocabularies of different encoders do not mix."),
    ] = "",
) -> None:
    """Make a vocabulary from a NumPy array and a list of names; with --split, of its classes in its order."""
    from d2zero.text.arrays import read_array, read_names

    _write(_flagged(read_array(file, read_names(names), encoder), split, unseen), output)


@app.command()
def clip(
    names: Annotated[str, typer.Argument(help=NAMES)],
    output: Output,
    weights: Annotated[Path, typer.Option("--weights", help="The CLIP model's weights (open_clip or OpenAI).")],
    model: Annotated[str, typer.Option("--model", help="The CLIP architecture, as open_clip names it.")] = "ViT-B-16",
    split: SplitName = None,
    unseen: Unseen = None,
) -> None:
    """Make a vocabulary from text, with a CLIP text encoder (needs the extra 'clip')."""
    from d2zero.text.arrays import read_names
    from d2zero.text.clip import encode_names

    _write(_flagged(encode_names(read_names(names), model, weights, tracked), split, unseen), output)


@app.command()
def text(
    names: Annotated[str, typer.Argument(help=NAMES)],
    output: Output,
    encoder: Annotated[
        Path, typer.Option("--text-encoder", help="A text encoder (.onnx), made by `d2zero export-text`.")
    ],
    split: SplitName = None,
    unseen: Unseen = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; the library chooses if left out.")
    ] = None,
) -> None:
    """Make a vocabulary from text with an exported text encoder, without torch (needs the extras 'cpu' and 'text')."""
    from d2zero.text.arrays import read_names

    _check_output(output)
    vocabulary = TextEncoder.load(encoder, threads=threads)(read_names(names), progress=tracked)
    _write(_flagged(vocabulary, split, unseen), output)


@app.command()
def vectors(
    file: Annotated[
        Path,
        typer.Argument(help="Word vectors: word2vec (text or binary), GloVe, or fastText's .vec; gzip is allowed."),
    ],
    names: Annotated[str, typer.Option("--names", help=f"{NAMES} 'coco' for COCO's 80.")],
    output: Output,
    split: SplitName = None,
    unseen: Unseen = None,
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            help="Their name; vocabularies of different encoders do not mix. word2vec, glove or fasttext, by the format"
            " of the file, if left out.",
        ),
    ] = "",
) -> None:
    """Make a vocabulary from a file of word vectors; names of several words are the mean of their words."""
    from d2zero.text.arrays import read_names
    from d2zero.text.vectors import read_vectors

    _check_output(output)
    vocabulary = read_vectors(file, read_names(names), encoder)
    _write(_flagged(vocabulary, split, unseen), output)
    print(f"recorded as embeddings of {vocabulary.encoder}")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A vocabulary (.npz) or an exported model (.onnx, .engine, .pt2).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the classes of a vocabulary, or of an exported model's default one."""
    vocabulary = read_exported(file).vocabulary if is_exported(file) else Vocabulary.load(file)
    if as_json:
        flags = zip(vocabulary.names, vocabulary.seen.tolist(), vocabulary.active.tolist(), strict=True)
        classes = [{"name": name, "seen": seen, "active": active} for name, seen, active in flags]
        print(json.dumps({"width": vocabulary.width, "source": vocabulary.source, "classes": classes}, indent=1))
        return
    print(f"{len(vocabulary)} classes, {vocabulary.width} values each, encoder {vocabulary.encoder or 'not recorded'}")
    for label, names in (("seen", vocabulary.seen_names), ("unseen", vocabulary.unseen_names)):
        if names:
            print(f"{label} ({len(names)}): {', '.join(names)}")
    if not vocabulary.active.all():
        active = [name for name, flag in zip(vocabulary.names, vocabulary.active, strict=True) if flag]
        print(f"active ({len(active)}): {', '.join(active)}")


@app.command()
def synonyms(
    file: Annotated[Path, typer.Argument(help="A vocabulary (.npz) that holds classes and synonyms for them.")],
    pairs: Annotated[
        list[str],
        typer.Argument(help="couch=sofa …: a synonym and the class that it counts for; or one .json of pairs."),
    ],
    output: Output,
) -> None:
    """Let synonyms count for a class: the score of 'couch' is added to that of 'sofa'."""
    given = _pairs(pairs)
    _write(Vocabulary.load(file).with_synonyms(given), output)
    print(f"{len(given)} synonyms")


@app.command("set")
def set_default(
    model: Annotated[
        Path, typer.Argument(help="An exported model (.onnx, .engine, .pt2); changed in place, atomically.")
    ],
    vocabulary: Annotated[Path, typer.Argument(help="The new default vocabulary (.npz).")],
) -> None:
    """Replace the default vocabulary inside an exported model, without exporting again."""
    classes = Vocabulary.load(vocabulary)
    if model.suffix == ".safetensors":
        raise D2ZeroError(
            f"{model} is a checkpoint; export it first, or give --vocabulary to `d2zero predict` and `eval`"
        )
    format_of(model).replace_vocabulary(model, classes)
    print(f"{model}: now {len(classes)} classes ({len(classes.unseen_names)} unseen)")


def _flagged(vocabulary: Vocabulary, split: str | None, unseen: str | None) -> Vocabulary:
    """A vocabulary with what a split, or a list of names, says of which classes are seen."""
    from d2zero.data.splits import find_split, with_split, with_unseen
    from d2zero.text.arrays import read_names

    if split and unseen:
        raise D2ZeroError("give either --split or --unseen: both say which classes are seen")
    if unseen is not None:
        return with_unseen(vocabulary, read_names(unseen))
    return with_split(vocabulary, find_split(split) if split else None)


def _pairs(texts: list[str]) -> dict[str, str]:
    if len(texts) == 1 and texts[0].endswith(".json"):
        from d2zero.data.json_stream import read_json

        content = read_json(Path(texts[0]))
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise D2ZeroError(f'{texts[0]} must hold pairs such as {{"couch": "sofa"}}')
        return content
    wrong = [text for text in texts if text.count("=") != 1 or not all(part.strip() for part in text.split("="))]
    if wrong:
        raise D2ZeroError(f"synonyms are given as word=class, such as couch=sofa, got {wrong[0]!r}")
    return {word.strip(): name.strip() for word, name in (text.split("=") for text in texts)}


def _check_output(output: Path) -> None:
    if output.suffix != ".npz":
        raise D2ZeroError(f"--output must end in .npz, got {output}")
    check_output(output)


def _write(vocabulary: Vocabulary, output: Path) -> None:
    _check_output(output)
    vocabulary.save(output)
    print(f"{output}: {len(vocabulary.seen_names)} seen and {len(vocabulary.unseen_names)} unseen classes")
