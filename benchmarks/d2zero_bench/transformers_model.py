"""A Mask2Former in a folder of transformers, from file to instances: what `d2zero convert` makes a checkpoint of.

It has the same weights as that checkpoint, so outputs can be compared beside times. It gets the same pixels as our
candidates, since outputs of other pixels would differ. Its post-processing is its own
(`post_process_instance_segmentation`), with all instances and a bitmap of each. It resizes mask logits to 384 x 384
first and masks from there by nearest neighbours: its masks are coarser than ours, and cost less to make.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from d2zero_bench.candidates import Outcome, Spec, limit_torch_threads, resident_ms
from d2zero_bench.cases import Case
from d2zero_bench.peers import resident_run, transformers_version
from d2zero_bench.report import NETWORK, STAGES, Accuracy, CandidateInfo
from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.images import Preprocessing


def preprocessing_of(folder: Path) -> Preprocessing:
    """What the converted checkpoint does to images."""
    from d2zero.checkpoints.transformers_folder import read_preprocessing

    return read_preprocessing(folder)[0]


def _weights(folder: Path) -> list[Path]:
    """The files of a folder's weights that are loaded: one, or those in its index.

    Raises:
        D2ZeroError: It has none as safetensors; others would be unpickled.
    """
    from d2zero.checkpoints.transformers_folder import weight_files

    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise D2ZeroError(
            f"{folder} has its weights in {files[0].name}, which is converted, but not loaded by transformers here;"
            " save it again with save_pretrained, which writes model.safetensors"
        )
    return files


class TransformersModel:
    """A Mask2Former, run eagerly by torch; measured as a `Candidate` is.

    Args:
        spec: Its path is the folder.

    Raises:
        D2ZeroError: The package transformers is not installed, or the folder cannot be used.
    """

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        if spec.threads:
            limit_torch_threads(spec.threads)
        import torch

        from d2zero.devices import pick_device

        version = transformers_version(f"measuring the folder {spec.path.name}")
        self._own, self._device = preprocessing_of(spec.path), pick_device(spec.device)
        weights = _weights(spec.path)
        transformers: Any = import_module("transformers")  # partly typed, and not to our use
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()  # one for every worker, among the benchmark's own
        try:
            network = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
                spec.path, local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # transformers', of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise D2ZeroError(f"transformers cannot load {spec.path}: {reason}") from error
        self._network, self._processor = network.eval().to(self._device), transformers.Mask2FormerImageProcessor()
        config = self._network.config
        self.info = CandidateInfo(
            spec.name,
            "transformers",
            f"transformers {version}, torch {torch.__version__} ({self._device}, float32)",
            megabytes=sum(path.stat().st_size for path in weights) / 1e6,
            queries=config.num_queries,
            classes=config.num_labels,
            decoder_layers=config.decoder_layers - 1,
        )

    def prepare(self, case: Case) -> None:
        """Nothing: it takes any size, and has its own classes.

        Raises:
            D2ZeroError: Other classes are asked for.
        """
        if case.classes is not None:
            raise D2ZeroError(f"{self.info.name} has {self.info.classes} classes and no others; leave out --classes")

    def run(self, case: Case, paths: Sequence[Path], with_logits: bool = False) -> Outcome:
        """Run one batch through all stages; then the network again if it is on a GPU."""
        import torch

        preprocessing = case.preprocessing(self._own)
        marks = [perf_counter()]
        images = [read_image(path) for path in paths]
        marks.append(perf_counter())
        resized = [preprocessing.resize(image) for image in images]
        batch = torch.from_numpy(preprocessing.batch(resized, preprocessing.padded_sizes(resized)[0]))
        marks.append(perf_counter())
        with torch.inference_mode(), float32_math(torch, tf32=False):
            out = self._network(pixel_values=batch.to(self._device))
            logits = out.class_queries_logits.cpu().numpy(), out.masks_queries_logits
            marks.append(perf_counter())
            self._processor.post_process_instance_segmentation(
                out, threshold=0.0, target_sizes=[image.shape[:2] for image in images], return_binary_maps=True
            )
            marks.append(perf_counter())
        sample = {name: 1000 * (end - start) for name, start, end in zip(STAGES, marks, marks[1:], strict=False)}
        on_gpu = self._device.type == "cuda"
        there = resident_run(self._network, batch.to(self._device)) if on_gpu else None
        sample[NETWORK] = resident_ms(there) if there else sample["inference"]
        return Outcome(sample, (logits[0], np.asarray(logits[1].cpu().numpy())) if with_logits else None)

    def evaluate(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """None: its post-processing gives no scores at full precision, nor masks at the image's."""
        return None
