"""`d2zero export` and `d2zero verify`: a checkpoint as one file without torch, and whether it is the same model."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError, load
from d2zero_runtime.segmenter import expand

if TYPE_CHECKING:
    from d2zero_export.verify import Difference


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint (.safetensors).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.onnx).")],
    deform_attn: Annotated[
        str, typer.Option("--deform-attn", help="gridsample, or gather (no operator that an engine gets wrong).")
    ] = "gridsample",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the file and compare it with the checkpoint.")
    ] = True,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest difference of logits that passes.")] = 1e-3,
) -> None:
    """Export a checkpoint to ONNX: any batch, size and vocabulary; verified against the checkpoint."""
    from d2zero.checkpoints.files import file_hash, load_model
    from d2zero_export.onnx_export import ExportConfig, export_onnx

    config = ExportConfig(deform_attn=deform_attn, tolerance=tolerance, verify=verify)
    if output.suffix != ".onnx":
        raise D2ZeroError(f"--output must end in .onnx, got {output}")
    model = load_model(checkpoint)
    parity = export_onnx(
        model, output, config, file_hash(checkpoint), lambda name: print(f"{name} …", file=sys.stderr, flush=True)
    )
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(model.vocabulary)} classes inside")
    if parity is None:
        print("not verified (--no-verify)")
        return
    for entry in parity.differences:
        print(_line(entry))


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint (.safetensors).")],
    model: Annotated[Path, typer.Argument(help="The exported model (.onnx).")],
    images: Annotated[Path | None, typer.Option("--images", help="A folder of photos to compare instances on.")] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="COCO JSON of those photos: compare accuracy, in all modes.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Compare instances on so many photos at most.")] = 50,
    logits: Annotated[float, typer.Option("--max-logits", help="Largest difference of logits that passes.")] = 1e-3,
    matched: Annotated[float, typer.Option("--min-matched", help="Least share of instances that agree.")] = 0.99,
    points: Annotated[
        float, typer.Option("--max-points", help="Largest difference of AP and recall, in points.")
    ] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
) -> None:
    """Is this file the same model? Exits with 1, naming what differs, if it is not."""
    from d2zero.checkpoints.files import load_model
    from d2zero.data.coco import read_coco
    from d2zero_export.verify import Limits
    from d2zero_export.verify import verify as compare

    if annotations and not images:
        raise D2ZeroError("--annotations need the folder of their images: give --images")
    truth = read_coco(annotations) if annotations else None
    files = [Path(str(item)) for item in expand(images)][:limit] if images else []
    result = compare(load_model(checkpoint), load(model), files, truth, images, Limits(logits, matched, points))
    for entry in result.parity.differences:
        print(_line(entry))
    agreement = result.instances
    print(
        f"  {agreement.instances} instances on {len(files) or 'drawn'} images: {100 * agreement.matched:.2f} % matched,"
        f" mean IoU {agreement.mean_iou:.5f}, {100 * agreement.same_label:.2f} % named alike,"
        f" scores within {agreement.score_difference:.1e}"
    )
    for mode, figures in result.accuracy.items():
        pairs = ", ".join(f"{name} {left:.2f}/{right:.2f}" for name, (left, right) in figures.items() if "segm" in name)
        print(f"  {mode} (checkpoint/exported): {pairs}")
    if json_file:
        json_file.write_text(json.dumps(asdict(result), indent=1))
    for failure in result.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print("not the same model" if result.failures else "the same model, within the limits")
    if result.failures:
        raise typer.Exit(1)


def _line(entry: "Difference") -> str:
    return (
        f"  {entry.case}: class logits {entry.class_logits:.1e}, mask logits {entry.mask_logits:.1e},"
        f" mask pixels flipped {100 * entry.flipped:.4f} %"
    )
