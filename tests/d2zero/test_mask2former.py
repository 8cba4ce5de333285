"""Mask2Former checkpoints of both layouts: converted, equal to transformers', and refused where they are others.

Where transformers' `post_process_instance_segmentation` and ours are comparable: it resizes mask logits to 384 x 384
whatever the image's size, and masks from there by nearest neighbours, so only at that input and output size are masks
the same. It keeps as many instances as there are queries, in no particular order, and drops those below a threshold
and without a mask; ours keeps a number that is asked for, best first. Instances are compared as sets.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import Command
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from mask2former_layouts import (
    NAMES,
    detectron2_arrays,
    empty_mask2former,
    mask2former,
    resnet,
    swin,
    transformers,
)

import d2zero
from d2zero.checkpoints.files import read_notes, save_model
from d2zero.checkpoints.mask2former import class_names, config_of, from_detectron2, model_of
from d2zero.checkpoints.published import renamed, require_exactly
from d2zero.checkpoints.transformers_folder import RULES, UNUSED, joined, read_folder
from d2zero.data.splits import COCO_IDS
from d2zero.model import D2Zero, build
from d2zero.model.backbone import Backbone
from d2zero.model.closed import closed_vocabulary
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.images import Preprocessing

TOLERANCE = 1e-4
WHOLE, PARTIAL = (96, 192), (64, 160)  # whole windows of 3 in every stage of Swin, and in none
SIZES = [WHOLE, PARTIAL]
BACKBONES = {"swin": swin, "resnet": resnet}


@dataclass(frozen=True, eq=False)
class Reference:
    """A model of transformers, and the folder that it was saved to."""

    model: Any
    folder: Path

    def heads(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Class logits and mask logits of every head, the final one last."""
        with torch.inference_mode():
            out = self.model(
                images, pixel_mask=torch.ones(len(images), *images.shape[2:]), output_auxiliary_logits=True
            )
        heads = [*out.auxiliary_logits, out]
        return [(head["class_queries_logits"], head["masks_queries_logits"]) for head in heads]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    @cache
    def reference(kind: str) -> Reference:
        folder = tmp_path_factory.mktemp(kind)
        model = mask2former(BACKBONES[kind]())
        model.save_pretrained(folder)
        transformers.Mask2FormerImageProcessor().save_pretrained(folder)
        return Reference(model, folder)

    return reference


@pytest.fixture(scope="module")
def converted(references: Callable[[str], Reference]) -> Callable[[str, str], D2Zero]:
    @cache
    def convert(kind: str, layout: str) -> D2Zero:
        folder = references(kind).folder
        if layout == "folder":
            return model_of(read_folder(folder))
        return model_of(from_detectron2(detectron2_arrays(folder)), NAMES)

    return convert


@pytest.fixture
def folder(references: Callable[[str], Reference], tmp_path: Path) -> Path:
    """A folder of transformers that a test may change."""
    return Path(shutil.copytree(references("swin").folder, tmp_path / "mask2former"))


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("layout", ["folder", "detectron2"])
@pytest.mark.parametrize("size", SIZES)
def test_every_head_equals_transformers(
    kind: str, layout: str, size: tuple[int, int], references: Callable, converted: Callable
) -> None:
    theirs = references(kind).heads(images(size))
    with torch.inference_mode():
        ours = converted(kind, layout)(images(size), all_heads=True)
    assert len(ours) == len(theirs) == 5
    for head, (class_logits, mask_logits) in zip(ours, theirs, strict=True):
        assert mask_logits.abs().max() > 1 and class_logits.std() > 0.1
        torch.testing.assert_close(head.class_logits, class_logits, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(head.mask_logits, mask_logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (160, 224), (192, 96)])
def test_swin_equals_transformers_at_any_size(size: tuple[int, int], references: Callable, converted: Callable) -> None:
    encoder = references("swin").model.model.pixel_level_module.encoder
    with torch.inference_mode():
        expected = encoder(images(size)).feature_maps
        maps = converted("swin", "folder").backbone(images(size))
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_windows_are_padded_before_they_are_shifted(converted: Callable) -> None:
    """timm's own order differs where a map is no whole number of windows, and only there."""
    model = converted("swin", "folder")
    options = {**model.config.backbone_options, "out_indices": (0, 1, 2, 3)}
    own: Any = timm.create_model(model.config.backbone, pretrained=False, features_only=True, **options).eval()
    own.load_state_dict(model.backbone.net.state_dict())
    with torch.inference_mode():
        whole, part = (
            [float((a - b).abs().max()) for a, b in zip(own(x), model.backbone.net(x), strict=True)]
            for x in (images(WHOLE), images(PARTIAL))
        )
    assert max(whole) < 1e-5 and min(part) > 0.01
    other = Backbone(model.config.backbone, model.config.backbone_options).eval()  # not Mask2Former's: timm's own
    other.net.load_state_dict(model.backbone.net.state_dict())
    with torch.inference_mode():
        for found, expected in zip(other(images(PARTIAL)), own(images(PARTIAL)), strict=True):
            torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), atol=0, rtol=0)


def test_instances_equal_transformers(references: Callable, converted: Callable) -> None:
    size = (384, 384)
    model = converted("swin", "folder")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = model.predict_raw([pixels])
    raw = SimpleNamespace(
        class_queries_logits=torch.from_numpy(out.class_logits), masks_queries_logits=torch.from_numpy(out.mask_logits)
    )
    threshold = 0.05
    (theirs,) = transformers.Mask2FormerImageProcessor().post_process_instance_segmentation(
        raw, threshold=threshold, target_sizes=[size], return_binary_maps=True
    )
    (ours,) = model.postprocess(
        out, [size], [size], max_detections=model.config.num_queries, score_threshold=threshold, masks="bitmap"
    )
    ours = ours.without_empty()
    assert 3 <= len(ours) == len(theirs["segments_info"])
    order = sorted(range(len(ours)), key=lambda row: -theirs["segments_info"][row]["score"])
    segments = [theirs["segments_info"][row] for row in order]
    assert ours.class_ids.tolist() == [segment["label_id"] for segment in segments]
    np.testing.assert_allclose(ours.scores, [segment["score"] for segment in segments], atol=2e-6)
    differing = (np.asarray(ours.masks) != theirs["segmentation"].numpy()[order].astype(bool)).mean()
    assert differing < 1e-5


SWIN_SIZES = {  # embedding width, depths, heads, window, queries
    "swin_tiny_patch4_window7_224": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 100),
    "swin_small_patch4_window7_224": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 100),
    "swin_base_patch4_window12_384": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 100),
    "swin_large_patch4_window12_384": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 200),
}
RESNET_DEPTHS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


@pytest.mark.parametrize("name", [*SWIN_SIZES, *RESNET_DEPTHS])
def test_published_sizes_are_read_off_the_shapes(name: str) -> None:
    queries = 100
    if name in SWIN_SIZES:
        width, depths, heads, window, queries = SWIN_SIZES[name]
        backbone = swin(embed_dim=width, depths=depths, num_heads=heads, window_size=window)
    else:
        backbone = resnet(depths=RESNET_DEPTHS[name], hidden_sizes=[256, 512, 1024, 2048])
    with torch.device("meta"):
        theirs = empty_mask2former(backbone, num_labels=80, num_queries=queries)
    arrays = read_state(theirs)
    config = config_of(arrays, Preprocessing())
    assert (config.backbone, config.num_queries, config.decoder_layers, config.num_heads) == (name, queries, 9, 8)
    with torch.device("meta"):
        require_exactly(build(config, closed_vocabulary(list(COCO_IDS))), arrays)


def read_state(model: Any) -> dict[str, Tensor]:
    """A model's arrays under our names, without a file."""
    arrays, unexpected = renamed(model.state_dict(), RULES, UNUSED)
    assert not unexpected
    return joined(arrays)


def test_a_folder_is_converted_by_the_command(folder: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("convert", folder, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 0 and "a Mask2Former of 5 classes (cat, dog" in outcome.out, outcome.err
    assert "note:" not in outcome.out
    model = d2zero.load(tmp_path / "m.safetensors")
    assert model.vocabulary.names == NAMES and model.vocabulary.seen.all()
    assert model.preprocessing == Preprocessing()
    assert model.contract().softmax_temperature == 1 and model.vocabulary.encoder == "closed"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = model_of(read_folder(folder)).predict_raw([pixels])
    np.testing.assert_array_equal(model.predict_raw([pixels]).class_logits, expected.class_logits)


@pytest.mark.parametrize("layout", ["pkl", "pth"])
def test_a_published_file_is_converted_by_the_command(
    layout: str, references: Callable, tmp_path: Path, command: Command
) -> None:
    arrays = detectron2_arrays(references("resnet").folder)
    source = tmp_path / f"model_final.{layout}"
    if layout == "pkl":
        source.write_bytes(pickle.dumps({"model": {name: array.numpy() for name, array in arrays.items()}}))
    else:
        torch.save({"model": arrays, "iteration": 7}, source)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    outcome = command("convert", source, "--names", tmp_path / "names.txt", "-o", tmp_path / "m.safetensors")
    assert outcome.code == 0, outcome.err
    assert d2zero.load(tmp_path / "m.safetensors").vocabulary.names == NAMES


def test_weights_in_several_files_and_in_half_precision(folder: Path, references: Callable) -> None:
    model = mask2former(swin()).half()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (found,) = model_of(read_folder(folder))(images(PARTIAL))
    assert found.class_logits.dtype == torch.float32
    class_logits, mask_logits = Reference(model.float(), folder).heads(images(PARTIAL))[-1]
    torch.testing.assert_close(found.class_logits, class_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.mask_logits, mask_logits, atol=TOLERANCE, rtol=0)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(D2ZeroError, match="incomplete: it lacks model-00002"):
        read_folder(folder)


Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def shortened(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: expected model.safetensors"),
        (shortened, "cut short"),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [1]}'), "is damaged"),
        (config(model_type="maskformer"), "model_type is 'maskformer'"),
        (config(pre_norm=True), "pre_norm is True"),
        (config(backbone_config={"model_type": ["swin"]}), "the backbone is ['swin'], expected 'swin' or 'resnet'"),
        (config(backbone_config={"model_type": "dinov2"}), "the backbone is 'dinov2', expected 'swin' or 'resnet'"),
        (config(backbone_config={"model_type": "swin", "hidden_act": "relu"}), "backbone_config.hidden_act is 'relu'"),
        (config(id2label={"0": "cat", "2": "dog"}), "id2label must name the classes 0, 1, 2"),
        (config(id2label={"0": "cat"}), "has 5 classes, got 1 names"),
        (config(id2label=dict(enumerate(["cat", "sky-other-merged", "a", "b", "c"]))), "panoptic or semantic model"),
    ],
)
def test_other_folders_are_refused_in_one_line(
    change: Change, message: str, folder: Path, tmp_path: Path, command: Command
) -> None:
    change(folder)
    outcome = command("convert", folder, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and message in outcome.err, outcome.err
    assert outcome.err.count("\n") == 1 and not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("backbone.norm2.weight"), "1 missing: backbone.output_norms.2.weight"),
        (lambda a: a.update({"sem_seg_head.extra": torch.zeros(1)}), "1 unexpected: sem_seg_head.extra"),
        (lambda a: a.pop("backbone.patch_embed.proj.weight"), "cut short: backbone.net.patch_embed.proj.weight"),
        (
            lambda a: a.update(
                {"backbone.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(10_000, 1)}
            ),
            "windows must have 1 to 32",
        ),
        (
            lambda a: a.update({"sem_seg_head.predictor.query_feat.weight": torch.zeros(2**40, 0)}),
            r"decoder.query_features: its shape is \(1099511627776, 0\)",
        ),
        (
            lambda a: a.update({"sem_seg_head.predictor.class_embed.weight": torch.zeros(2**40, 0)}),
            r"classifier.linear.weight: its shape is \(1099511627776, 0\)",
        ),
        (
            lambda a: a.update({"sem_seg_head.predictor.class_embed.weight": torch.zeros(5001, 64)}),
            "the checkpoint has 5000 classes, got 5 names",
        ),
        (
            lambda a: a.update({"sem_seg_head.predictor.query_feat.weight": torch.zeros(60_000, 1)}),
            r"decoder.query_features \(60000, 1\) instead of \(60000, 64\)",
        ),
    ],
)
def test_other_arrays_are_refused(change: Callable, message: str, references: Callable) -> None:
    arrays = detectron2_arrays(references("swin").folder)
    change(arrays)
    with pytest.raises(D2ZeroError, match=message):
        model_of(from_detectron2(arrays), NAMES)


def test_memory_is_taken_only_for_arrays_that_fit(references: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    monkeypatch.setattr(
        "d2zero.checkpoints.published.build",
        lambda *given: devices.append(torch.get_default_device()) or build(*given),
    )
    arrays = detectron2_arrays(references("swin").folder)
    arrays["sem_seg_head.predictor.query_feat.weight"] = torch.zeros(60_000, 1)
    with pytest.raises(D2ZeroError):
        model_of(from_detectron2(arrays), NAMES)
    assert [device.type for device in devices] == ["meta"]


def test_only_parts_of_one_array_are_joined() -> None:
    parts = {f"qkv.weight[{part}]": torch.full((2, 3), part) for part in range(3)}
    assert joined(parts)["qkv.weight"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2 + [[2] * 3] * 2
    for others in (
        {f"x[{part}]": torch.tensor(part) for part in range(3)},
        {f"x[{part}]": torch.zeros(part) for part in range(3)},
        {"x[0]": torch.zeros(1), "x[2]": torch.zeros(1), "x[3]": torch.zeros(1)},
        {"weight]": torch.zeros(1), "[0]": torch.zeros(1)},
        {"qkv.weight": torch.zeros(1), **parts},
    ):
        assert joined(others) == others


DARKNET = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor",
}  # fmt: skip


def of_80_classes(folder: Path, names: list[str]) -> None:
    """Give a folder's model a fresh head for so many classes."""
    arrays = load_file(folder / "model.safetensors")
    arrays |= {"class_predictor.weight": torch.zeros(81, 64), "class_predictor.bias": torch.zeros(81)}
    save_file(arrays, folder / "model.safetensors")
    config(id2label=dict(enumerate(names)))(folder)


@pytest.mark.parametrize(
    ("names", "expected", "noted"),
    [
        ([DARKNET.get(name, name) for name in COCO_IDS], list(COCO_IDS), "motorbike is motorcycle, aeroplane is"),
        ([name.replace(" ", "_") for name in reversed(COCO_IDS)], list(reversed(COCO_IDS)), "hair_drier is hair drier"),
        (["sofa", *list(COCO_IDS)[1:]], ["sofa", *list(COCO_IDS)[1:]], ""),  # "couch" is another of its classes
        ([f"LABEL_{number}" for number in range(80)], list(COCO_IDS), "does not name its 80 classes"),
        (list(COCO_IDS), list(COCO_IDS), ""),
    ],
)
def test_other_names_of_cocos_classes_become_cocos(
    names: list[str], expected: list[str], noted: str, folder: Path, tmp_path: Path, command: Command
) -> None:
    of_80_classes(folder, names)
    outcome = command("convert", folder, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 0 and noted in outcome.out and ("note:" in outcome.out) == bool(noted), outcome.err
    assert list(d2zero.load(tmp_path / "m.safetensors").vocabulary.names) == expected
    assert noted in "".join(read_notes(tmp_path / "m.safetensors").get("notes", []))


def test_given_names_are_used_as_they_are(folder: Path, tmp_path: Path, command: Command) -> None:
    names = [DARKNET.get(name, name) for name in COCO_IDS]
    of_80_classes(folder, names)
    outcome = command("convert", folder, "--names", ",".join(names), "-o", tmp_path / "m.safetensors")
    assert outcome.code == 0 and "note:" not in outcome.out, outcome.err
    assert list(d2zero.load(tmp_path / "m.safetensors").vocabulary.names) == names


def test_names_that_transformers_makes_up_are_none(folder: Path) -> None:
    config(id2label={str(number): f"LABEL_{number}" for number in range(5)})(folder)
    with pytest.raises(D2ZeroError, match="has 5 classes and does not name them; give --names"):
        model_of(read_folder(folder))


def test_names_of_a_file_without_names() -> None:
    assert class_names(80, None) == list(COCO_IDS)
    assert class_names(2, ["skyscraper", "blue sky"]) == ["skyscraper", "blue sky"]
    for count, given, message in (
        (133, None, "like panoptic or semantic models of COCO panoptic"),
        (7, None, "does not name them; give --names"),
        (2, ["cat"], "got 1 names"),
        (2, ["Sky", "road"], "has the class 'Sky'"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            class_names(count, given)


@pytest.mark.parametrize(
    ("values", "expected", "noted"),
    [
        ({"size": {"shortest_edge": 640, "longest_edge": 900}}, Preprocessing(640, 900), ""),
        ({"size": 640, "max_size": 900}, Preprocessing(640, 900), ""),
        ({"size": {"shortest_edge": 640}, "max_size": 900}, Preprocessing(640, 900), ""),
        ({"size": {"shortest_edge": 640}}, Preprocessing(640, 1333), ""),
        ({"do_resize": False}, Preprocessing(), "does not resize images; here they are resized"),
        ({"size": {"height": 384, "width": 384}}, Preprocessing(), "shortest edge 800, longest at most 1333"),
        ({"resample": 3}, Preprocessing(), "resized bilinearly"),
        ({"do_normalize": False}, Preprocessing(mean=(0, 0, 0), std=(255, 255, 255)), ""),
        ({"image_mean": [0.5, 0.5, 0.5], "do_rescale": False}, Preprocessing(mean=(0.5,) * 3, std=(1, 2, 3)), ""),
        (None, Preprocessing(), "has no preprocessor_config.json"),
    ],
)
def test_preprocessing_of_a_folder(
    values: dict[str, Any] | None, expected: Preprocessing, noted: str, folder: Path
) -> None:
    path = folder / "preprocessor_config.json"
    written = json.loads(path.read_text())
    path.unlink()
    if values is not None:
        std = {"image_std": [1, 2, 3]} if "do_rescale" in values else {}
        path.write_text(json.dumps({**written, **std, **values}))
    checkpoint = read_folder(folder)
    assert checkpoint.preprocessing == expected
    assert noted in "".join(checkpoint.notes) and bool(checkpoint.notes) == bool(noted)


def test_a_closed_model_chooses_among_its_own_classes(converted: Callable, tmp_path: Path) -> None:
    model = converted("swin", "folder")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    everything = model.predict_raw([pixels]).class_logits
    try:
        model.set_vocabulary(model.vocabulary.select(["car", "dog"]))
        chosen = model.predict_raw([pixels]).class_logits
        np.testing.assert_array_equal(chosen, everything[..., [4, 1, 5]])
        saved = d2zero.load(save_model(model, tmp_path / "m.safetensors"))
        np.testing.assert_array_equal(saved.predict_raw([pixels]).class_logits, chosen)
    finally:
        model.set_vocabulary(closed_vocabulary(NAMES))


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (
            Vocabulary(("zebra",), np.eye(1, 5, dtype=np.float32), source={"encoder": "word2vec"}),
            "has others",
        ),
        (Vocabulary(("zebra",), np.eye(1, 5, dtype=np.float32)), "has others"),
        (closed_vocabulary(["zebra", "giraffe"]), "a closed vocabulary, the 5 classes that it was trained on"),
        (closed_vocabulary(list(reversed(NAMES))), "that of another closed model with 5 classes"),
    ],
)
def test_a_closed_model_refuses_other_classes(vocabulary: Vocabulary, message: str, converted: Callable) -> None:
    model = converted("swin", "folder")
    for target in (model, model.segmenter()):
        with pytest.raises(D2ZeroError, match=message):
            target.set_vocabulary(vocabulary)
    if vocabulary.encoder != "closed":
        with pytest.raises(D2ZeroError, match=message):
            build(replace(model.config, text_dim=vocabulary.width), vocabulary)
    with pytest.raises(D2ZeroError, match="needs unseen classes"):
        model.predict([np.zeros((32, 32, 3), np.uint8)], mode="zsis")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-v", "vocabulary.npz"], "give --names in place of --vocabulary"),
        (["--names", "a,b"], "has 5 classes, got 2 names"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, references: Callable, tmp_path: Path, command: Command
) -> None:
    outcome = command("convert", references("swin").folder, *options, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and message in outcome.err


def test_one_file_of_a_folder_is_refused(folder: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("convert", folder / "model.safetensors", "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and f"give the folder that it is in, {folder}" in outcome.err
    (folder / "config.json").unlink()
    outcome = command("convert", folder / "model.safetensors", "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and "has no config.json beside it" in outcome.err and "give the folder" not in outcome.err
