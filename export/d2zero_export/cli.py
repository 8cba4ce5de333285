"""`d2zero export`: a checkpoint as one file that runs without torch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime import D2ZeroError


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
        print(
            f"  {entry.case}: class logits {entry.class_logits:.1e}, mask logits {entry.mask_logits:.1e},"
            f" mask pixels flipped {100 * entry.flipped:.4f} %"
        )
