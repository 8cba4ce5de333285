"""`d2zero export` and `d2zero verify`: a checkpoint as one file without torch, and whether it is the same model."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.images import Size
from d2zero_runtime.segmenter import expand

if TYPE_CHECKING:
    from d2zero_export.verify import RawParity, Verification


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint (.safetensors).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.onnx).")],
    precision: Annotated[str, typer.Option("--precision", help="float32, or float16 for GPUs.")] = "float32",
    deform_attn: Annotated[
        str,
        typer.Option(
            "--deform-attn",
            help="gridsample, gather (no operator that an engine gets wrong) or plugin (TensorRT's own; only it runs).",
        ),
    ] = "gridsample",
    size: Annotated[
        str | None, typer.Option("--size", help="Fix the size, as 800x1216 (height x width, multiples of 32).")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Fix the number of images a run.")] = None,
    bake: Annotated[bool, typer.Option("--bake", help="Make the classes constants: they cannot be changed.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the file and compare it with the checkpoint.")
    ] = True,
    max_logits: Annotated[
        float | None,
        typer.Option("--max-logits", help="Largest difference of logits that passes; by precision if left out."),
    ] = None,
) -> None:
    """Export a checkpoint to ONNX: any batch, size and vocabulary; verified against the checkpoint."""
    from d2zero.checkpoints.files import file_hash, load_model
    from d2zero_export.onnx_export import ExportConfig, export_onnx

    if output.suffix != ".onnx":
        raise D2ZeroError(f"--output must end in .onnx, got {output}")
    config = ExportConfig(precision, deform_attn, _size(size), batch, bake, verify, max_logits)
    model = load_model(checkpoint)
    parity = export_onnx(model, output, config, file_hash(checkpoint), _stage)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {precision}, {len(model.vocabulary)} classes inside")
    _show_parity(parity)


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint (.safetensors).")],
    model: Annotated[Path, typer.Argument(help="The exported model.")],
    images: Annotated[Path | None, typer.Option("--images", help="A folder of photos to compare instances on.")] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="COCO JSON of those photos: compare accuracy, in all modes.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Compare instances on so many photos at most.")] = 50,
    provider: Annotated[list[str] | None, typer.Option("--provider", help="cpu, cuda, tensorrt.")] = None,
    max_logits: Annotated[
        float | None, typer.Option("--max-logits", help="Largest difference of logits that passes.")
    ] = None,
    max_relative: Annotated[
        float | None,
        typer.Option("--max-relative", help="Largest mean difference of logits, as a share of their size."),
    ] = None,
    min_matched: Annotated[
        float | None, typer.Option("--min-matched", help="Least share of instances that agree.")
    ] = None,
    max_points: Annotated[
        float | None, typer.Option("--max-points", help="Largest difference of AP and recall, in points.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
) -> None:
    """Is this file the same model? Exits with 1, naming what differs, if it is not.

    Limits that are left out are those of the file's precision.
    """
    from d2zero.checkpoints.files import load_model
    from d2zero.data.coco import read_coco
    from d2zero_export.verify import LIMITS
    from d2zero_export.verify import verify as compare

    if annotations and not images:
        raise D2ZeroError("--annotations need the folder of their images: give --images")
    truth = read_coco(annotations) if annotations else None
    files = [Path(str(item)) for item in expand(images)][:limit] if images else []
    given = {"logits": max_logits, "relative": max_relative, "matched": min_matched, "points": max_points}
    limits = replace(LIMITS[_precision(model)], **{name: value for name, value in given.items() if value is not None})
    result = compare(load_model(checkpoint), model, files, truth, images, limits, provider or ("cpu",))
    _show_verification(result, len(files))
    if json_file:
        json_file.write_text(json.dumps({**asdict(result), "limits": asdict(limits)}, indent=1))
    for failure in result.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print("not the same model" if result.failures else "the same model, within the limits")
    if result.failures:
        raise typer.Exit(1)


def _precision(model: Path) -> str:
    from d2zero_runtime.onnx_file import read_contract

    return read_contract(model)[0].precision


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise D2ZeroError(f"--size must be HEIGHTxWIDTH such as 800x1216, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _stage(name: str) -> None:
    print(f"{name} …", file=sys.stderr, flush=True)


def _show_parity(parity: "RawParity | None") -> None:
    if parity is None:
        print("not verified (--no-verify)")
        return
    from rich.table import Table

    from d2zero.cli.terminal import console

    table = Table(
        "compared with the checkpoint", "class logits", "mean", "mask logits", "mean", "pixels flipped", box=None
    )
    for entry in parity.differences:
        table.add_row(
            entry.case,
            f"{entry.class_logits:.1e}",
            f"{entry.class_relative:.4%}",
            f"{entry.mask_logits:.1e}",
            f"{entry.mask_relative:.4%}",
            f"{entry.flipped:.4%}",
        )
    console().print(table)


def _show_verification(result: "Verification", photos: int) -> None:
    _show_parity(result.parity)
    if result.attention_flipped is not None:
        print(f"  bits of the decoder's attention masks flipped: {100 * result.attention_flipped:.4f} %")
    agreement = result.instances
    print(
        f"  {agreement.instances} instances on {photos or 'drawn'} images: {100 * agreement.matched:.2f} % matched,"
        f" mean IoU {agreement.mean_iou:.5f}, {100 * agreement.same_label:.2f} % named alike,"
        f" scores within {agreement.score_difference:.1e}"
    )
    for mode, figures in result.accuracy.items():
        pairs = ", ".join(f"{name} {left:.2f}/{right:.2f}" for name, (left, right) in figures.items() if "segm" in name)
        print(f"  {mode} (checkpoint/exported): {pairs}")
