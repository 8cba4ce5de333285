"""What a training run leaves in its folder, and which of it is meant where a checkpoint is asked for; no torch."""

import logging
import os
from pathlib import Path

from d2zero_runtime import D2ZeroError

logger = logging.getLogger("d2zero")

STATE_FILE = "last.pt"  # everything a resume needs
MODEL_FILE = "model.safetensors"  # the finished model
BEST_FILE = "best.safetensors"  # the model of the best evaluation
CONFIG_FILE = "config.json"  # the settings
KEPT_FOLDER = "checkpoints"


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: a file itself; of a run's folder its best model, else the finished one, else
    the last state.

    Raises:
        D2ZeroError: The folder holds none of them.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (BEST_FILE, MODEL_FILE, STATE_FILE):
        if (path / name).is_file():
            logger.warning("%s: its %s is used", path, name)
            return path / name
    raise D2ZeroError(f"{path} is a folder without {BEST_FILE}, {MODEL_FILE} or {STATE_FILE}; give a run's, or a file")
