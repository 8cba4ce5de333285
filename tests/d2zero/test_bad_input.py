"""User-facing error messages: one line that says what to do, and exit code 2."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Command
from models import placeholder_vocabulary
from onnx import helper

from d2zero.demo.run import packaged_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path, exported: Path) -> Path:
    """A folder full of mistakes."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(shapes_data, folder / "data")
    placeholder_vocabulary().save(folder / "words48.npz")
    (folder / "empty").mkdir()
    (folder / "folder.onnx").mkdir()
    (folder / "text.json").write_text("not json")
    (folder / "list.json").write_text("[]")
    whole = (folder / "data/annotations/instances_val_gzsi_shapes.json").read_text()
    content = json.loads(whole)
    for entry in content["annotations"][:3]:
        del entry["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))
    (folder / "no_images.json").write_text(json.dumps({**content, "images": []}))
    (folder / "cut.json").write_text(whole[:500])
    checkpoint = packaged_checkpoint().read_bytes()
    (folder / "model.safetensors").write_bytes(checkpoint)
    (folder / "cut.safetensors").write_bytes(checkpoint[:100_000])
    (folder / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    np.save(folder / "nan.npy", np.full((2, 8), np.nan, np.float32))
    np.save(folder / "three.npy", np.ones((3, 8), np.float32))
    (folder / "cut.npy").write_bytes((folder / "three.npy").read_bytes()[:100])
    (folder / "w2v.txt").write_text("\n".join(",".join(["0.5"] * 66) for _ in range(300)))
    (folder / "half.txt").write_text("\n".join(",".join(["0.5"] * 66) for _ in range(150)))
    (folder / "nothing.txt").touch()
    (folder / "latin.txt").write_bytes("Säge".encode("latin-1"))
    (folder / "words.txt").write_text("these are words\nnot numbers")
    shutil.copy(exported, folder / "model.onnx")
    (folder / "cut.onnx").write_bytes(exported.read_bytes()[:5000])
    shutil.copy(packaged_checkpoint(), folder / "renamed.onnx")
    onnx.save(helper.make_model(helper.make_graph([], "nothing", [], [])), folder / "foreign.onnx")
    (folder / "lonely.engine").write_bytes(b"a plan")
    (folder / "some").mkdir()
    shutil.copy(folder / "data/val/1000001.png", folder / "some")
    (folder / "broken").mkdir()
    (folder / "broken/photo.jpg").write_bytes(b"\xff\xd8 cut short")
    return folder


VALIDATION = "data/annotations/instances_val_gzsi_shapes.json"
TRAIN = "train --preset shapes --data data -v data/vocabulary.npz -o run --device cpu"
CASES = [
    ("", None),
    ("fly", "No such command 'fly'"),
    ("eval --bogus", "No such option: --bogus"),
    ("eval", "give a checkpoint, --detections FILE or --index FOLDER"),
    ("eval none.safetensors --data data", "checkpoint none.safetensors does not exist"),
    ("eval cut.safetensors --data data", "damaged, cut short"),
    ("eval cut.pth --data data", "turn a published one into it with `d2zero convert`"),
    ("eval model.safetensors", "give --data DIR"),
    ("eval model.safetensors --data nowhere", "data folder nowhere does not exist"),
    ("eval model.safetensors --data empty", "no annotations/*_gzsi_shapes.json in empty"),
    ("eval model.safetensors --data data --mode best", "gzsis, zsis, gzsis-copy-paste, got 'best'"),
    ("eval model.safetensors --data data --split coco-48-17", "of split shapes, this needs coco-48-17"),
    ("eval model.safetensors --data data --vocabulary words48.npz", "width 64, the vocabulary has 300"),
    ("eval model.safetensors --data data --device tpu9", "device must be auto, cpu or cuda"),
    ("eval model.safetensors --data data --images empty -o out", "none of the 24 images"),
    ("eval model.safetensors --data data --pictures sheet.xyz", "--pictures must end in .png"),
    ("eval model.safetensors --data data --json empty", "--json takes a file"),
    ("eval model.safetensors --data data -o text.json", "--output takes a folder"),
    ("eval model.safetensors --data data --device mps", "device must be auto, cpu or cuda"),
    ("eval model.safetensors --images data/val --annotations boxes.json", "3 of"),
    ("eval model.safetensors --images data/val --annotations no_images.json", "lists no images"),
    ("eval model.safetensors --images data/val --annotations cut.json", "is not JSON or is cut short"),
    ("eval model.safetensors --images data/val --annotations list.json", "is not a COCO annotation file"),
    ("eval model.safetensors --data data --batch-size 0", "Invalid value for '--batch-size'"),
    ("eval model.safetensors --data data --json text.json/place.json", "text.json is no folder"),
    ("eval --detections text.json --annotations data/annotations/instances_val_gzsi_shapes.json", "--split NAME"),
    (
        "eval --detections list.json --split coco-48-17 --annotations data/annotations/instances_val_gzsi_shapes.json",
        "not in split coco-48-17",
    ),
    ("eval --detections list.json --split coco-48-17 --annotations list.json --limit 3", "leave out flags"),
    (
        "train --preset huge --data data -v v.npz -o run",
        "preset must be one of default, coco-48-17, coco-65-15",
    ),
    ("train --preset shapes --data data -v none.npz -o run", "vocabulary none.npz does not exist"),
    ("train --preset shapes --data data -v text.json -o run", "is not a vocabulary"),
    ("train --preset shapes -v words48.npz -o run", "give --data DIR, or --annotations FILE with --images DIR"),
    ("train --annotations a.json --images data -o run", "training needs classes: give --vocabulary"),
    ("train --preset shapes --config c.json --data data -o run", "give either --preset or --config"),
    ("train --steps 3 --epochs 2 --data data -o run", "give either --steps or"),
    ("train --data data -o run --init-skip classifier", "--init-skip is for --init"),
    (
        "train --preset coco-65-15 --data data -v words48.npz -o run",
        "no split is recorded to find annotations in data by",
    ),
    (f"{TRAIN} --set optim.lr=fast", "optim.lr must be of type float"),
    (f"{TRAIN} --set optim.lr=NaN", "optim.lr must be positive"),
    (f"{TRAIN} --set optim.warmup_steps=-5", "optim.warmup_steps must not be negative"),
    (f"{TRAIN} --set workers=-1", "workers must not be negative"),
    (f"{TRAIN} --set augment.scale_range=[1]", "two rising positive numbers"),
    (f"{TRAIN} --set model.adaptation_heads=0", "adaptation_heads must be at least 1"),
    (f"{TRAIN.replace('shapes', 'default')} --set model.backbone=resnet5000", "timm has no backbone 'resnet5000'"),
    (f"{TRAIN} --set precision=float16", "needs a GPU"),
    (f"{TRAIN} --resume", "has no checkpoint"),
    (f"{TRAIN} --init cut.safetensors", "damaged, cut short"),
    (f"{TRAIN} --images empty", "none of the 48 images"),
    (f"{TRAIN} --annotations data/annotations/instances_val_gzsi_shapes.json --images data/val", "not be zero-shot"),
    ("train --preset shapes --data data -v data/vocabulary.npz -o text.json", "takes a folder"),
    ("convert none.pth -v words48.npz -o m.safetensors", "checkpoint none.pth does not exist"),
    ("convert cut.pth -v words48.npz -o m.safetensors", "is damaged, or is not a checkpoint of plain arrays"),
    ("convert cut.pth -v words48.npz -o m.onnx", "--output must end in .safetensors"),
    ("vocab word2vec none.txt --split coco-48-17 -o v.npz", "does not exist"),
    ("vocab word2vec w2v.txt --split coco-65-15 -o v.npz", "66 columns, split coco-65-15 needs 81"),
    ("vocab word2vec words.txt --split coco-48-17 -o v.npz", "not a table of comma-separated numbers"),
    ("vocab word2vec w2v.txt --split coco-1-1 -o v.npz", "split must be one of"),
    ("vocab npy nan.npy --names a,b -o v.npz", "NaN or infinity for a, b"),
    ("vocab npy three.npy --names a,b -o v.npz", "has 3 rows, but 2 names"),
    ("vocab npy three.npy --names a,b,a -o v.npz", "a given more than once"),
    ("vocab npy three.npy --names none.txt -o v.npz", "file of names none.txt does not exist"),
    ("vocab npy three.npy --names a,b,c --split coco-48-17 -o v.npz", "lack 65 classes of split coco-48-17"),
    ("vocab npy cut.npy --names a,b,c -o v.npz", "is damaged"),
    ("vocab npy three.npy --names a,b,c -o v.txt", "--output must end in .npz"),
    ("vocab clip cat --weights none.pt -o v.npz", "CLIP weights none.pt do not exist"),
    ("vocab clip cat --model ViT-Z --weights none.pt -o v.npz", "open_clip has no model 'ViT-Z'"),
    ("vocab show text.json", "is not a vocabulary"),
    ("vocab show three.npy", "make a vocabulary of it with `d2zero vocab npy`"),
    ("vocab npy three.npy --names latin.txt -o v.npz", "is not UTF-8 text"),
    ("vocab npy three.npy --names a,b,c -o text.json/v.npz", "cannot be written"),
    ("vocab word2vec half.txt --split coco-48-17 -o v.npz", "has 150 rows, a word2vec file has 300"),
    ("vocab word2vec nothing.txt --split coco-48-17 -o v.npz", "is empty"),
    ("data split --data empty --split coco-48-17", "has no folder 'annotations'"),
    ("data split --data data --split coco-48-17", "no instances_train20XX.json"),
    (
        "data split --data data --split coco-48-17 --train-json data/annotations/instances_train_seen_shapes.json"
        " --val-json data/annotations/instances_val_gzsi_shapes.json",
        "lacks categories of the split: bus, dog",
    ),
    ("export none.safetensors -o m.onnx", "checkpoint none.safetensors does not exist"),
    ("export cut.safetensors -o m.onnx", "damaged, cut short"),
    ("export model.safetensors", "Missing option '--output'"),
    ("export model.safetensors -o m.pt2", "got m.pt2; for that, give --format pt2"),
    ("export model.safetensors -o m.pt", "--output must end in .onnx for --format onnx"),
    ("export model.safetensors -o m.onnx --format openvino", "--format must be one of onnx, tensorrt"),
    ("export model.safetensors -o m.onnx --precision bfloat16", "an .onnx is float32 or float16; bfloat16 is for"),
    ("export model.safetensors -o m.onnx --for cpu", "--for is for --format pt2"),
    ("export model.safetensors -o m.pt2 --format pt2 --for tpu", "a .pt2 is compiled for one of cpu, cuda, got 'tpu'"),
    (
        "export model.safetensors -o m.pt2 --format pt2 --for cpu --precision float16",
        "on a CPU a .pt2 is float32 or bfloat16; float16 is for GPUs",
    ),
    ("export model.safetensors -o m.pt2 --format pt2 --deform-attn gather", "--format pt2 takes a checkpoint"),
    ("vocab show none.pt2", "model none.pt2 does not exist"),
    (
        "export model.safetensors -o m.onnx --precision int4",
        "precision must be one of float32, float16, bfloat16, int8",
    ),
    ("export model.safetensors -o m.onnx --precision int8", "give their folder with --calibration"),
    (
        "export model.safetensors -o m.onnx --precision int8 --calibration nowhere",
        "--calibration takes a folder of photos",
    ),
    ("export model.safetensors -o m.onnx --precision int8 --calibration broken", "broken/photo.jpg is not an image"),
    ("export model.safetensors -o m.onnx --precision int8 --calibration empty", "folder empty holds no images"),
    ("export model.safetensors -o m.onnx --deform-attn plugin", "deform-attn must be one of gridsample, gather"),
    ("export model.safetensors -o m.onnx --calibration data/val", "are for --precision int8, got precision float32"),
    ("export model.safetensors -o m.onnx --quantize-for gpu", "quantize-for must be cpu or tensorrt, got 'gpu'"),
    ("export model.safetensors -o m.onnx --mode zsis", "--mode are for --end-to-end"),
    ("export model.safetensors -o m.onnx --end-to-end --mode gzsis-copy-paste", "has one of the modes gzsis, zsis"),
    ("export model.safetensors -o m.onnx --quantize-for tensorrt", "are for --precision int8, got precision float32"),
    ("export model.safetensors -o m.onnx --deform-attn magic", "deform-attn must be one of"),
    ("export model.safetensors -o m.onnx --size 800x1210", "size must be multiples of 32, got 800x1210"),
    ("export model.safetensors -o m.onnx --size large", "--size must be HEIGHTxWIDTH"),
    ("export model.safetensors -o m.onnx --batch 0", "Invalid value for '--batch'"),
    ("export model.safetensors -o m.onnx --max 1x800x800x80", "are for --format tensorrt"),
    ("export model.safetensors -o m.engine --format tensorrt", "TensorRT cannot be used here"),
    ("export model.onnx -o n.onnx", "is exported already"),
    ("verify model.safetensors none.onnx", "model none.onnx does not exist"),
    ("verify model.safetensors cut.onnx", "is damaged, cut short"),
    ("verify model.safetensors renamed.onnx", "is damaged, cut short, or no ONNX file"),
    ("verify model.safetensors model.onnx --images empty", "folder empty holds no images"),
    ("verify model.safetensors model.onnx --annotations boxes.json", "give --images"),
    (
        f"verify model.safetensors model.onnx --images some --annotations {VALIDATION}",
        "23 of the 24 images of instances_val_gzsi_shapes.json are not in some",
    ),
    (
        f"benchmark model.onnx --images some --annotations {VALIDATION}",
        "23 of the 24 images of instances_val_gzsi_shapes.json are not in some",
    ),
    ("verify model.safetensors model.onnx --provider cuda", "CUDAExecutionProvider not available"),
    ("predict none.jpg -m model.onnx -o found", "none.jpg does not exist; give an image, a folder or a pattern"),
    ("predict broken -m model.onnx -o found", "1 of 1 files could not be read"),
    ("predict empty -m model.onnx -o found", "folder empty holds no images"),
    ("predict data/*.jpg -m model.onnx -o found", "no file matches"),
    ("predict data/val -m none.onnx -o found", "model none.onnx does not exist"),
    ("predict data/val -m foreign.onnx -o found", "carries no d2zero contract"),
    ("predict data/val -m lonely.engine -o found", "lonely.engine.json is missing"),
    ("predict data/val -m words.txt -o found", "expected a checkpoint (.safetensors) or an exported model"),
    ("predict data/val -m model.onnx -o text.json", "--output takes a folder"),
    ("predict data/val -m model.onnx -o found --mode best", "mode must be one of"),
    ("predict data/val -m model.onnx -o found --score 2", "Invalid value for '--score'"),
    ("predict data/val -m model.onnx -o found --provider cuda", "CUDAExecutionProvider not available"),
    ("predict data/val -m model.onnx -o found --device cpu", "--device is not for .onnx files"),
    ("predict data/val -m model.safetensors -o found --provider cpu", "--provider is for exported models"),
    ("predict data/val -m model.onnx -o found -v words48.npz", "width 64, the vocabulary has 300"),
    ("vocab set model.onnx words48.npz", "width 64, the vocabulary has 300"),
    ("vocab set model.safetensors words48.npz", "model.safetensors is a checkpoint; export it first"),
    ("vocab set foreign.onnx words48.npz", "carries no d2zero contract"),
    ("vocab set none.onnx words48.npz", "model none.onnx does not exist"),
    ("vocab set model.onnx none.npz", "vocabulary none.npz does not exist"),
    ("vocab show cut.onnx", "is damaged, cut short"),
    ("vocab show lonely.engine", "lonely.engine.json is missing"),
    ("vocab synonyms words48.npz couch=sofa -o v.npz", "must be names of the vocabulary"),
    ("vocab synonyms words48.npz couch -o v.npz", "given as word=class"),
    ("vocab synonyms words48.npz bus=dog dog=cat -o v.npz", "dog stands for another itself"),
    ("vocab synonyms words48.npz list.json -o v.npz", "must hold pairs"),
    ("data shapes -o drawn --size 8", "size must be at least 32"),
    ("demo --set steps=3", "give --train with it"),
    ("demo -o text.json", "takes a folder"),
    ("export model.safetensors -o text.json/model.onnx", "text.json is no folder"),
    ("export model.safetensors -o folder.onnx", "--output takes a file"),
]


@pytest.mark.parametrize(("line", "message"), CASES)
def test_one_line_and_exit_code_2(
    line: str, message: str | None, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    outcome = command(*line.split())
    assert outcome.code == 2, outcome
    if message is None:
        assert "Usage" in outcome.out + outcome.err
        return
    assert outcome.err.splitlines()[-1].startswith("error: ") and message in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    if not line.startswith("predict") or "could not be read" not in outcome.err:  # there, each file has its line
        assert outcome.err.count("\n") == 1 and not outcome.out


def test_help_texts(command: Command) -> None:
    for words in (
        "",
        "train",
        "eval",
        "convert",
        "demo",
        "vocab",
        "vocab clip",
        "vocab npy",
        "data",
        "data split",
        "export",
        "verify",
        "predict",
    ):
        outcome = command(*words.split(), "--help")
        assert outcome.code == 0 and "Usage" in outcome.out and "--help" in outcome.out


def test_folder_without_permission_is_a_line_too(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "no", str(place / "x.npz"))

    monkeypatch.setattr("d2zero_runtime.Vocabulary.save", refuse)
    outcome = command("vocab", "npy", place / "three.npy", "--names", "a,b,c", "-o", place / "x.npz")
    assert outcome.code == 2 and "no permission to use" in outcome.err
