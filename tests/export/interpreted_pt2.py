"""A `.pt2` that calls our Triton operators, in Triton's interpreter on a CPU; run by `test_pt2` as a program.

The interpreter must be chosen before Triton is imported. How the operator is called from compiled code is then what a
GPU would see; the kernel's own compilation is not.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_network import tiny

from d2zero.model.deformable import DeformableImpl
from d2zero_export import attention, pt2_export
from d2zero_export.options import Pt2Options
from d2zero_runtime import load
from d2zero_runtime.artifacts.pt2 import Pt2Metadata


def main(folder: Path) -> None:
    path = folder / "triton.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt2_export, "best_impl", lambda *_, **__: DeformableImpl.TRITON)
        patch.setattr(attention, "in_triton", lambda device: True)
        pt2_export.export_pt2(tiny(), path, Pt2Options(verify=False))
    description = Pt2Metadata.read(path)
    assert description.operators == pt2_export.TRITON_OPERATORS and description.channels_last
    assert description.contract.deform_attn == "triton"
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3)).astype(np.uint8)  # small: the interpreter is slow
    ours, theirs = tiny().segmenter().predict_raw([image]), load(path).predict_raw([image])
    np.testing.assert_allclose(ours.class_logits, theirs.class_logits, atol=1e-3)
    np.testing.assert_allclose(ours.mask_logits, theirs.mask_logits, atol=1e-3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
