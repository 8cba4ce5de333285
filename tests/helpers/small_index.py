"""An index of drawn images, made by the demo's model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2zero_runtime import load
from d2zero_runtime.index.index import IndexDescription, IndexWriter


def write_index(folder: Path, model: Path, images: Sequence[Path], rows: int = 10, **options: Any) -> Path:
    """Options: `features`, and a `vocabulary` other than the model's own."""
    with load(model, threads=1) as segmenter:
        if "vocabulary" in options:
            segmenter.set_vocabulary(options["vocabulary"])
        description = IndexDescription.of(segmenter, options.get("features", "float16"))
        with IndexWriter(folder, description, rows) as writer:
            for path, segments in segmenter.segment_stream(images):
                writer.add(Path(str(path)), segments)
    return folder
