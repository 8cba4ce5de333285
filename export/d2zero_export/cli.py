"""`d2zero export`, `export-text` and `verify`: models as files without torch, and whether they are the same models."""

import json
import logging
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2zero.checkpoints.runs import checkpoint_file
from d2zero.cli.terminal import BuildProgress, console, tracked
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.artifacts.profile import Shape
from d2zero_runtime.backends.tensorrt.environment import SDKS, require_tensorrt
from d2zero_runtime.errors import optional
from d2zero_runtime.files import check_output, write_text
from d2zero_runtime.images import Size
from d2zero_runtime.masks.postprocess import Mode
from d2zero_runtime.sources import expand

if TYPE_CHECKING:
    from d2zero.model import D2Zero
    from d2zero_export.engine_options import EngineOptions
    from d2zero_export.options import OnnxOptions, Pt2Options
    from d2zero_export.parity import RawParity
    from d2zero_export.verify import Verification

logger = logging.getLogger("d2zero")

SUFFIXES = {"onnx": ".onnx", "tensorrt": ".engine", "tensorrt-rtx": ".engine", "pt2": ".pt2"}


def export(
    model: Annotated[
        Path,
        typer.Argument(help="A checkpoint (.safetensors) or a run's folder; for an engine also an exported .onnx."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.onnx, .engine or .pt2).")],
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", "-v", help="Classes inside, instead of the checkpoint's (.npz).")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which of the --vocabulary's classes are seen: a name or a file.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx; tensorrt: an engine for this machine's GPU; tensorrt-rtx: an engine for RTX GPUs, built on any"
            " machine; pt2: compiled by torch, for machines with torch.",
        ),
    ] = "onnx",
    precision: Annotated[
        str, typer.Option("--precision", help="float32; float16 for GPUs; bfloat16 for --format pt2; int8.")
    ] = "float32",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help="int8: a folder of photos like those that the model will see (no annotations)."
        ),
    ] = None,
    calibration_images: Annotated[
        int, typer.Option("--calibration-images", min=1, help="int8: maximum number of photos.")
    ] = 32,
    quantize_for: Annotated[
        str | None,
        typer.Option("--quantize-for", help="int8: cpu, or tensorrt (symmetric; the default for engines)."),
    ] = None,
    deform_attn: Annotated[
        str | None,
        typer.Option(
            "--deform-attn",
            help="gridsample (default for ONNX) or gather (default for engines: common operators only).",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Static height x width, such as 800x1216; multiples of 32.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Static number of images per run.")] = None,
    bake: Annotated[
        bool, typer.Option("--bake", help="Make the class embeddings constants; the vocabulary cannot be changed then.")
    ] = False,
    whole: Annotated[
        bool,
        typer.Option("--end-to-end", help="Pre- and post-processing in the file, too: from pixels to detections."),
    ] = False,
    masks: Annotated[
        str | None,
        typer.Option("--masks", help="end-to-end: packed (bits, the default), or logits (at a quarter of the size)."),
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option("--max-detections", min=1, help="end-to-end: maximum number of instances (100)."),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="end-to-end: gzsis (the default) or zsis.")] = None,
    decoder_layers: Annotated[
        int | None,
        typer.Option("--decoder-layers", min=1, help="Stop after so many decoder layers: faster, less accurate."),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="float32 on GPUs: allow TF32 (faster, rounded to ten bits); recorded in the file."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the file and compare it with what it was made from.")
    ] = True,
    max_logits: Annotated[
        float | None,
        typer.Option("--max-logits", help="Largest difference of logits that passes; by precision if left out."),
    ] = None,
    smallest: Annotated[
        str | None, typer.Option("--min", help="Engine: smallest shape, batch x height x width x classes: 1x480x480x1.")
    ] = None,
    best: Annotated[str | None, typer.Option("--opt", help="Engine: the shape to tune for: 1x800x1216x80.")] = None,
    largest: Annotated[str | None, typer.Option("--max", help="Engine: largest shape: 4x1344x1344x1203.")] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", help="tensorrt: measured kernels, read and written; later builds are faster."),
    ] = None,
    device: Annotated[int, typer.Option("--device", min=0, help="tensorrt: CUDA's number of the GPU.")] = 0,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            help="tensorrt-rtx: build for GPUs of this compute capability, such as 8.9 (repeatable); for Ampere and"
            " later if left out.",
        ),
    ] = None,
    compile_for: Annotated[
        str | None, typer.Option("--for", help="pt2: cpu, or cuda (where there is a GPU, the default).")
    ] = None,
) -> None:
    """Export a checkpoint to ONNX or .pt2, or build a TensorRT engine; verified before it counts as done."""
    _check_target(output, target)
    model = checkpoint_file(model)
    exported = model.suffix == ".onnx"
    if split and not vocabulary:
        raise D2ZeroError("--split goes with --vocabulary")
    source = _Source(model, vocabulary, split)
    if exported and vocabulary:
        raise D2ZeroError(f"{model} is exported already; change its classes with `d2zero vocab set`")
    engine = None
    if target in SDKS:
        from d2zero_export.engine import EngineOptions, require_builder

        engine = EngineOptions(
            min=_shape(smallest),
            opt=_shape(best),
            max=_shape(largest),
            timing_cache=timing_cache,
            tf32=tf32,
            device=device,
            sdk=target,
            compute_capabilities=tuple(compute_capability or ()),
            verify=verify,
            max_logits=max_logits,
        )
        require_builder(engine)  # known before minutes of work
    elif any((smallest, best, largest, timing_cache, device, compute_capability)):
        raise D2ZeroError(
            "--min, --opt, --max, --timing-cache, --device and --compute-capability are for --format tensorrt and"
            " tensorrt-rtx"
        )
    if compile_for and target != "pt2":
        raise D2ZeroError("--for is for --format pt2")
    if target == "pt2" and (exported or deform_attn):
        raise D2ZeroError("--format pt2 takes a checkpoint (.safetensors), and chooses --deform-attn by its device")
    if exported and engine is None:
        raise D2ZeroError(
            f"{model} is exported already; give a checkpoint (.safetensors), or --format tensorrt or tensorrt-rtx"
        )
    graph_flags = (deform_attn, size, batch, bake, calibration, quantize_for, decoder_layers, whole)
    if exported and (any(graph_flags) or precision != "float32"):
        raise D2ZeroError(
            "--precision, --calibration, --quantize-for, --deform-attn, --decoder-layers, --end-to-end, --size, --batch"
            " and --bake are choices of the ONNX file; export it again"
        )
    if not whole and any((masks, max_detections, mode)):
        raise D2ZeroError("--masks, --max-detections and --mode are for --end-to-end")
    if exported and engine:
        _build(model, output, engine)
        return
    from d2zero_export.options import OnnxOptions, Pt2Options, local_device
    from d2zero_runtime.artifacts.contract import EndToEnd

    graph: dict[str, Any] = {
        "precision": precision,
        "size": _size(size),
        "batch": batch,
        "bake": bake,
        "decoder_layers": decoder_layers,
        "verify": verify,
        "tf32": tf32,
        "max_logits": max_logits,
    }
    if target == "pt2":
        if whole:
            raise D2ZeroError("--end-to-end is for an .onnx or an engine")
        if calibration or quantize_for:
            raise D2ZeroError("--calibration and --quantize-for are for --precision int8 of an .onnx or an engine")
        _export_pt2(
            _Source(model, vocabulary, split), output, Pt2Options(device=compile_for or local_device(), **graph)
        )
        return
    given = {"masks": masks, "max_detections": max_detections, "mode": Mode.parse(mode) if mode else None}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    whole_options = EndToEnd(**chosen) if whole else None
    graph["quantize_for"] = quantize_for or ("tensorrt" if engine and precision == "int8" else "cpu")
    options = OnnxOptions(
        end_to_end=whole_options,
        deform_attn=deform_attn or ("gather" if engine else "gridsample"),
        calibration=calibration,
        calibration_images=calibration_images,
        **graph,
    )
    file = output.with_suffix(".onnx")
    if engine and file.exists():
        raise D2ZeroError(
            f"{file}, where the network would be written on the way to the engine, exists; give it as the model to"
            " build from it, or another --output"
        )
    _export_onnx(source, file, options)
    if engine:
        _build(file, output, engine, model)


def export_text(
    model: Annotated[str, typer.Argument(help="The CLIP architecture, as open_clip names it, such as ViT-B-16.")],
    weights: Annotated[Path, typer.Option("--weights", help="The CLIP model's weights (open_clip or OpenAI).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.onnx).")],
) -> None:
    """Export a CLIP model's text encoder to ONNX, to type names where there is no torch; verified against open_clip."""
    check_output(output)
    for package in ("onnxscript", "open_clip", "tokenizers", "ftfy", "onnxruntime"):
        optional(package)
    from d2zero_export.text_export import export_text_encoder

    difference = export_text_encoder(model, weights, output, _stage)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, embeddings of names within {difference:.1e} of open_clip's")


def _check_target(output: Path, target: str) -> None:
    if target not in SUFFIXES:
        raise D2ZeroError(f"--format must be one of {', '.join(SUFFIXES)}, got {target!r}")
    if output.suffix != SUFFIXES[target]:
        other = next((name for name, suffix in SUFFIXES.items() if suffix == output.suffix), None)
        hint = f"; for that, give --format {other}" if other else ""
        raise D2ZeroError(f"--output must end in {SUFFIXES[target]} for --format {target}, got {output}{hint}")
    check_output(output)


@dataclass(frozen=True)
class _Source:
    """A checkpoint, and the classes to export it with."""

    checkpoint: Path
    vocabulary: Path | None = None
    split: str | None = None

    def load(self) -> "tuple[D2Zero, str]":
        """The model, and its file's hash."""
        from d2zero.checkpoints.files import load_model
        from d2zero.data.splits import find_split, with_split

        model = load_model(self.checkpoint)
        if self.vocabulary:
            split = find_split(self.split) if self.split else None
            model.set_vocabulary(with_split(Vocabulary.load(self.vocabulary), split))
        return model, model.checkpoint


def _export_onnx(source: _Source, output: Path, options: "OnnxOptions") -> None:
    optional("onnxscript")  # asks for the extra that brings torch, too, where neither is installed
    from d2zero_export.onnx_export import export_onnx

    model, checkpoint_hash = source.load()
    parity = export_onnx(model, output, options, checkpoint_hash, _stage)
    size = output.stat().st_size / 1e6
    print(f"{output}: {size:.1f} MB, {options.precision}, {len(model.vocabulary)} classes inside")
    _show_parity(parity)
    if options.end_to_end and options.verify:
        print("end to end: the instances that the runtime makes of the network's output")


def _export_pt2(source: _Source, output: Path, options: "Pt2Options") -> None:
    import torch

    from d2zero_export.pt2_export import export_pt2, hardware

    model, checkpoint_hash = source.load()
    parity = export_pt2(model, output, options, checkpoint_hash, _stage)
    size = output.stat().st_size / 1e6
    machine = hardware(options.device)
    print(f"{output}: {size:.1f} MB, {options.precision}, for {machine} with torch {torch.__version__}")
    _show_parity(parity)


def _build(onnx_file: Path, output: Path, options: "EngineOptions", checkpoint: Path | None = None) -> None:
    """Build an engine and compare it with its checkpoint, or with the ONNX file on the CPU."""
    from d2zero_export.engine import build_engine
    from d2zero_runtime.backends.tensorrt.issues import known_issues

    sdk = SDKS[options.sdk]
    with BuildProgress() as progress:
        metadata = build_engine(onnx_file, output, options, _stage, progress)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, shapes {metadata.profile.min} to {metadata.profile.max}")
    for issue in known_issues(metadata.contract, sdk, metadata.tensorrt):
        logger.warning("%s", issue)
    if not options.verify:
        _show_parity(None)
        return
    if metadata.contract.end_to_end:
        print("not verified: this runtime does not run end-to-end engines; verify the .onnx", file=sys.stderr)
        return
    if sdk.portable:
        try:
            require_tensorrt(options.device, sdk)
        except D2ZeroError as error:
            reason = str(error).partition(";")[0]
            print(f"not verified: {reason}; verify it with `d2zero verify` where it runs", file=sys.stderr)
            return
    from d2zero_export.parity import limits_for
    from d2zero_export.verify import as_exported, raw_parity
    from d2zero_runtime import load

    _stage("verify")
    if checkpoint:
        from d2zero.checkpoints.files import load_model

        reference = as_exported(load_model(checkpoint), metadata.contract).segmenter()
        reference.set_vocabulary(metadata.vocabulary)
    else:
        reference = load(onnx_file)
    built = load(output)
    parity = raw_parity(reference, built)
    _show_parity(parity)
    failures = parity.failures(limits_for(built.precision, options.max_logits))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if failures:
        print(f"{output} was built, but it is not the same model: do not use it", file=sys.stderr)
        raise typer.Exit(1)


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint (.safetensors).")],
    model: Annotated[Path, typer.Argument(help="The exported model.")],
    images: Annotated[Path | None, typer.Option("--images", help="A folder of photos to compare instances on.")] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="COCO JSON of those photos: compare accuracy, in all modes.")
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, help="Maximum number of photos to compare instances on; accuracy takes all."),
    ] = 50,
    provider: Annotated[
        list[str] | None,
        typer.Option("--provider", help="The backend of an .onnx: cpu, cuda, tensorrt, openvino or openvino-bf16."),
    ] = None,
    max_logits: Annotated[
        float | None, typer.Option("--max-logits", help="Largest difference of logits that passes.")
    ] = None,
    max_relative: Annotated[
        float | None,
        typer.Option(
            "--max-relative", help="Largest mean difference of logits that passes, relative to their mean size."
        ),
    ] = None,
    min_matched: Annotated[
        float | None, typer.Option("--min-matched", help="Minimum share of instances that agree.")
    ] = None,
    max_points: Annotated[
        float | None, typer.Option("--max-points", help="Largest difference of AP and recall that passes, in points.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the full result to this file.")] = None,
) -> None:
    """Compare an exported model with its checkpoint; exit with 1, naming what differs, if it is another model.

    Limits that are left out are those of the file's precision.
    """
    from d2zero.checkpoints.files import load_model
    from d2zero.data.coco import read_coco
    from d2zero_export.verify import verify as compare

    if annotations and not images:
        raise D2ZeroError("--annotations need the folder of their images: give --images")
    check_output(json_file, "--json")
    truth = read_coco(annotations) if annotations else None
    files = [Path(str(item)) for item in expand(images)][:limit] if images else []
    given = {"logits": max_logits, "relative": max_relative, "matched": min_matched, "points": max_points}
    given["hm_points"] = max_points
    changed = {name: value for name, value in given.items() if value is not None}
    result = compare(
        load_model(checkpoint),
        model,
        images=files,
        annotations=truth,
        image_folder=images,
        changed_limits=changed,
        providers=provider,
        progress=tracked,
    )
    if json_file:
        write_text(json_file, json.dumps(_plain(result), indent=1))
    _show_verification(result, len(files))
    for failure in result.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print("not the same model" if result.failures else "the same model, within the limits")
    if result.failures:
        raise typer.Exit(1)


def _plain(result: "Verification") -> dict[str, Any]:
    """For JSON, which has no infinity: a limit that there is not is null."""
    content = asdict(result)
    content["limits"] = {name: value if math.isfinite(value) else None for name, value in content["limits"].items()}
    return content


def _shape(text: str | None) -> Shape | None:
    return Shape.parse(text) if text else None


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
        print("not verified (--no-verify)", file=sys.stderr)
        return
    if not parity.differences:  # of an end-to-end file, which has no logits
        return
    from rich.table import Table

    table = Table(
        *("compared with the checkpoint", "class logits (largest)", "mean", "mask logits (largest)", "mean"),
        "pixels flipped",
        caption="largest: of nine queries in ten, in brackets of all; with the same attention masks, both are of all",
        box=None,
    )
    for entry in (*parity.differences, *parity.same_attention):
        table.add_row(
            entry.case,
            f"{entry.class_most:.1e} ({entry.class_logits:.1e})",
            f"{entry.class_relative:.4%}",
            f"{entry.mask_most:.1e} ({entry.mask_logits:.1e})",
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
    for mode, metrics in result.accuracy.items():
        pairs = ", ".join(f"{name} {left:.2f}/{right:.2f}" for name, (left, right) in metrics.items() if "segm" in name)
        print(f"  {mode} (checkpoint/exported): {pairs}")
