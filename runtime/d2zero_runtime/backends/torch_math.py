"""How torch computes in float32, decided for a block of code instead of inherited from the process.

torch is passed in: the runtime imports it only where a backend needs it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TURN = threading.RLock()


@contextmanager
def float32_math(torch: Any, tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 convolutions and matmuls; restored however the block ends.

    It matters on CUDA, and in matmuls on the few CPUs that have TF32.

    The settings belong to the process, so blocks of several threads take turns, and other code of other threads sees
    them while a block runs. torch has two APIs for them. The older one is written, because it updates both: after
    writes through the newer one only, torch raises RuntimeError wherever it reads the older one, as its compiler does
    (pytorch#166387). The newer one is what is read and restored, because it can always be read.

    Args:
        torch: The module.
        tf32: Whether factors may be rounded to TF32's 10 bits of mantissa.
    """
    with _TURN:
        backends = torch.backends
        newer = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
        precisions = [setting.fp32_precision for setting in newer]
        matmul = _or_none(torch.get_float32_matmul_precision)
        cudnn = _or_none(lambda: backends.cudnn.allow_tf32)
        try:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            backends.cudnn.allow_tf32 = tf32
            yield
        finally:
            if matmul is not None:
                torch.set_float32_matmul_precision(matmul)
            if cudnn is not None:
                backends.cudnn.allow_tf32 = cudnn
            for setting, precision in zip(newer, precisions, strict=True):
                setting.fp32_precision = precision


def _or_none(read: Any) -> Any:
    """A setting of the older API; None where the newer one has made it unreadable."""
    try:
        return read()
    except RuntimeError:
        return None
