"""A `.pt2` that calls the Triton form's operator, in Triton's interpreter on a CPU; run by `test_pt2` as a program.

The interpreter must be chosen before Triton is imported. How the operator is called from compiled code is then what a
GPU would see; the kernel's own compilation is not.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_network import tiny

from d2zero.model.deformable_triton import triton_form
from d2zero_export import pt2_export
from d2zero_runtime import load
from d2zero_runtime.pt2_file import Pt2Description


def main(folder: Path) -> None:
    path = folder / "triton.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt2_export, "best_form", lambda device: triton_form)
        parity = pt2_export.export_pt2(tiny(), path)
    assert parity is not None and all(entry.class_logits < 1e-3 for entry in parity.differences)
    description = Pt2Description.read(path)
    assert description.operators == ("d2zero::deformable_attention",)
    assert description.contract.deform_attn == "triton"
    assert load(path)(np.zeros((50, 70, 3), np.uint8)).image_size == (50, 70)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
