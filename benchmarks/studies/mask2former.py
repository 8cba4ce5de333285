"""Mask2Former as published, in transformers and converted: is every head equal?

    python benchmarks/studies/mask2former.py --backbones resnet50,swin-tiny --sizes 448x672,416x608

Random weights, batch 2, class and mask logits of every head. The decoder attends where mask logits are not negative:
one that is nearer to 0 than rounding errors falls to either side, and from that head on single queries differ by more.
So the largest difference is given where ours attends by the masks of transformers, and where each attends by its own;
the bits that differ then are counted.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from d2zero.checkpoints.mask2former import model_of
from d2zero.checkpoints.transformers_folder import read_folder
from d2zero.cli.terminal import console
from d2zero.model import D2Zero
from d2zero.model.d2zero import HeadOutput
from d2zero.model.decoder import attention_masks
from d2zero_bench.cases import parse_sizes
from d2zero_bench.tables import Table
from d2zero_runtime import D2ZeroError
from studies.study import header, parser_of, run, write

BATCH = 2
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {  # configuration of transformers, and its options
    "resnet50": ("ResNetConfig", {}),
    "resnet101": ("ResNetConfig", {"depths": [3, 4, 23, 3]}),
    "swin-tiny": ("SwinConfig", {}),
    "swin-base": (
        "SwinConfig", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--backbones", default="resnet50,swin-tiny", help=f"some of {', '.join(BACKBONES)}")
    parser.add_argument("--sizes", default="448x672,416x608", help="heights x widths of the network's input")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument("--keep", type=Path, help="a folder to keep the models of transformers in")
    parser.add_argument("--json", type=Path, help="write all that was found")
    return run(compare, parser, arguments)


def compare(given: argparse.Namespace) -> None:
    """Compare all that was asked for."""
    chosen, sizes = given.backbones.split(","), parse_sizes(given.sizes)
    unknown = [name for name in chosen if name not in BACKBONES]
    if unknown:
        raise D2ZeroError(f"--backbones must be some of {', '.join(BACKBONES)}; got {unknown[0]!r}")
    found: list[dict[str, Any]] = []
    try:
        with TemporaryDirectory() as folder:
            for name in chosen:
                theirs, ours = _models(name, given.seed, (given.keep or Path(folder)) / name)
                found += [{"backbone": name, **_compared(theirs, ours, size, given.seed)} for size in sizes]
    finally:
        console().print(_table(found).for_terminal())
        write(given.json, {"kind": "mask2former", **header(__file__, given, seed=given.seed), "found": found})


def _models(backbone: str, seed: int, folder: Path) -> tuple[Any, D2Zero]:
    """A model of transformers with random weights, saved, and what is converted from its folder."""
    transformers: Any = import_module("transformers")  # partly typed, and not to our use
    kind, options = BACKBONES[backbone]
    config = transformers.Mask2FormerConfig(
        backbone_config=getattr(transformers, kind)(out_features=STAGES, **options),
        id2label={number: f"class {number}" for number in range(80)},
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    draw_weights(model, seed)
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessor().save_pretrained(folder)
    return model, model_of(read_folder(folder))


def draw_weights(model: Any, seed: int) -> None:
    """Give a Mask2Former of transformers random weights that keep activations about as large as they are."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, array in model.state_dict().items():
            if array.is_floating_point() and "empty_weight" not in name:
                array.copy_(_drawn(name, torch.randn(array.shape, generator=draw)))


def _drawn(name: str, noise: Tensor) -> Tensor:
    if "running_var" in name:
        return 1 + 0.1 * noise.abs()
    if noise.dim() < 2:
        return (1 if name.endswith("weight") else 0) + 0.1 * noise
    if "queries" in name or "level_embed" in name:
        return noise
    scaled: Tensor = noise / noise[0].numel() ** 0.5
    return scaled


@torch.inference_mode()
def _compared(theirs: Any, ours: D2Zero, size: tuple[int, int], seed: int) -> dict[str, Any]:
    images = torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(seed))
    out = theirs(images, pixel_mask=torch.ones(BATCH, *size), output_auxiliary_logits=True)
    expected = [(head["class_queries_logits"], head["masks_queries_logits"]) for head in (*out.auxiliary_logits, out)]
    masks = attention_masks([masks for _, masks in expected], size)
    own = ours(images, all_heads=True)
    same = ours(images, all_heads=True, attention_masks=masks)
    own_masks = attention_masks([head.mask_logits for head in own], size)
    return {
        "size": list(size),
        "mask_range": float(expected[-1][1].abs().max()),
        "same_attention": _differences(same, expected),
        "own_attention": _differences(own, expected),
        "flipped": [int((left != right).sum()) for left, right in zip(own_masks, masks, strict=True)],
    }


def _differences(heads: Sequence[HeadOutput], expected: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
    return [
        {
            "class_logits": float((head.class_logits - classes).abs().max()),
            "mask_logits": float((head.mask_logits - masks).abs().max()),
        }
        for head, (classes, masks) in zip(heads, expected, strict=True)
    ]


def _table(found: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            entry["backbone"],
            "×".join(map(str, entry["size"])),
            *(
                f"{max(head[key] for head in entry[how]):.1e}"
                for how in ("same_attention", "own_attention")
                for key in ("class_logits", "mask_logits")
            ),
            str(sum(entry["flipped"])),
        ]
        for entry in found
    ]
    head = ["", "size", "class, same attention", "mask, same attention", "class", "mask", "bits that differ"]
    return Table(head, rows, "largest differences of logits in any head, transformers and converted")


if __name__ == "__main__":
    sys.exit(main())
