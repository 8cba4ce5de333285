"""Inference contracts and post-processing of D2Zero without torch.

`Vocabulary` (classes), `Preprocessing` and `read_image` (input), `postprocess` (raw output → instances),
`Detections` (result), `load` (an exported model, as a `Segmenter`), `Segments` (what is found, before it has names),
`TextEncoder` (names typed at run time, as a vocabulary), `D2ZeroError` (what the user can fix).
Events go to the logger `d2zero`, which is silent until a program that uses this one configures it.
"""

import logging

import d2zero_runtime.old_names  # noqa: F401
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Preprocessing
from d2zero_runtime.loading import load
from d2zero_runtime.masks.postprocess import Mode, postprocess
from d2zero_runtime.segmenter import Segmenter
from d2zero_runtime.segments import Segments
from d2zero_runtime.sources import read_image
from d2zero_runtime.text.encoder import TextEncoder
from d2zero_runtime.vocabulary import Vocabulary

logging.getLogger("d2zero").addHandler(logging.NullHandler())

__version__ = "0.1.0"
__all__ = [
    "D2ZeroError",
    "Detections",
    "Mode",
    "Preprocessing",
    "Segmenter",
    "Segments",
    "TextEncoder",
    "Vocabulary",
    "load",
    "postprocess",
    "read_image",
]
