"""`d2zero eval --index`: accuracy of one or several vocabularies over an index."""

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from d2zero.cli.evaluate import by_mode, grouped, report_without_pixels, show
from d2zero.cli.index import opened_index
from d2zero.cli.terminal import console, tracked
from d2zero.data.coco import open_coco
from d2zero.data.splits import Split, check_split
from d2zero.evaluation.index_run import IndexRun, summaries_by_vocabulary
from d2zero.evaluation.table import comparison_table, per_class_comparison
from d2zero_runtime import D2ZeroError, Mode, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import write_text

logger = logging.getLogger("d2zero")


def evaluate_index(
    folder: Path,
    annotations: Path | None,
    split: Split | None,
    vocabularies: list[Path],
    modes: list[Mode],
    threads: int | None,
    json_file: Path | None,
    per_class: bool,
) -> None:
    """Evaluate vocabularies over an index (its own if there are none), show the metrics and write them.

    Raises:
        D2ZeroError: Files cannot be used or do not fit; or, at the end, the index has shards that cannot be used.
    """
    if annotations is None:
        raise D2ZeroError("--index needs --annotations FILE, the ground truth of its images")
    classes = _loaded(vocabularies)
    with opened_index(folder, threads) as index, open_coco(annotations) as truth:
        report_without_pixels(truth)
        classes = classes or {"the index's vocabulary": index.vocabulary}
        if split:
            for vocabulary in classes.values():
                check_split(vocabulary, split)
        found = summaries_by_vocabulary(IndexRun(index, grouped(truth, split)), classes, modes, tracked)
        first = next(iter(found.values()))
        several = len(found) > 1
        if json_file:
            content = {name: by_mode(summaries) for name, summaries in found.items()} if several else by_mode(first)
            write_text(json_file, json.dumps(content, indent=1))
        if several:
            _compare([{name: summaries[mode] for name, summaries in found.items()} for mode in modes], per_class)
        else:
            show(list(first.values()), per_class)
        if json_file:
            print(f"all metrics: {json_file}", file=sys.stderr)
        missing = first[modes[0]]["missing"]
        if missing:
            share = f"{len(missing)} of {len(truth.images)} images of {annotations.name}"
            names = join_truncated(missing)
            logger.warning("%s are not in %s and count as without detections: %s", share, folder, names)


def _loaded(files: list[Path]) -> dict[str, Vocabulary]:
    """Vocabularies by the names of their files, or by their paths where two have one name."""
    repeated = [path for path, count in Counter(files).items() if count > 1]
    if repeated:
        raise D2ZeroError(f"--vocabulary {repeated[0]} is given more than once; give each once")
    short = len({path.name for path in files}) == len(files)
    return {path.name if short else str(path): Vocabulary.load(path) for path in files}


def _compare(summaries: list[dict[str, dict[str, Any]]], per_class: bool) -> None:
    """Tables of several vocabularies, for each mode."""
    screen = console()
    for by_name in summaries:
        screen.print(comparison_table(by_name))
        if per_class:
            screen.print(per_class_comparison(by_name))
