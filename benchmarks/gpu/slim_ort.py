"""Make ONNX Runtime's CUDA wheel small enough to carry: the device code of other GPUs and of other models is zeroed.

    pip install zstandard
    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 onnxruntime-gpu==1.30.0
    python benchmarks/gpu/slim_ort.py onnxruntime_gpu-1.30.0-*.whl .carried/onnxruntime.tar.xz

Of the fat binaries in `libonnxruntime_providers_cuda.so`, code for compute capability 9.0 (H100, H200) stays, except
the attention kernels of language models. Zeros compress to nothing, and file offsets stay valid. The package works on
that kind of GPU and on CPUs only.
"""

import re
import struct
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

CAPABILITY = 90
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LEFT_OUT = (
    "capi/libonnxruntime.so", "providers_tensorrt.so", "onnxruntime/transformers/", "onnxruntime/tools/", "ThirdParty",
)  # fmt: skip
LANGUAGE_MODELS = (b"cutlass", b"flash", b"paged", b"kernel_mha", b"xqa")
MAGIC = struct.pack("<I", 0xBA55ED50)  # of a fat binary
SYMBOL = re.compile(rb"_Z[A-Za-z0-9_]{6,400}")
SYMBOLS = 400  # looked at in a part's code


def parts(library: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, compute capability) of the code of each part of each fat binary."""
    place = 0
    while (found := library.find(MAGIC, place)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", library, found + 4)
        if (version, header) != (1, 16):  # the number occurs elsewhere, too
            place = found + 4
            continue
        place, end = found + header, found + header + size
        while place < end:
            header, length = struct.unpack_from("<IQ", library, place + 4)
            (capability,) = struct.unpack_from("<I", library, place + 28)
            yield place + header, place + header + length, capability
            place += header + length


def slimmed(library: bytes) -> bytes:
    """The library with all code zeroed that is not kept."""
    import zstandard

    result = bytearray(library)
    for start, end, capability in parts(library):
        dropped = capability != CAPABILITY
        if not dropped:
            code = zstandard.ZstdDecompressor().decompressobj().decompress(library[start:end])
            names = b" ".join(SYMBOL.findall(code)[:SYMBOLS])
            dropped = any(word in names for word in LANGUAGE_MODELS)
        if dropped:
            result[start:end] = bytes(end - start)
    return bytes(result)


def main() -> None:
    """Read the wheel, write the archive."""
    wheel, output = map(Path, sys.argv[1:])
    output.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(wheel) as source, tarfile.open(output, "w:xz") as archive:
        for name in source.namelist():
            if any(part in name for part in LEFT_OUT) or name.endswith("/"):
                continue
            content = source.read(name)
            entry = tarfile.TarInfo(name)
            kept = slimmed(content) if name == PROVIDER else content
            entry.size, entry.mode = len(kept), 0o755
            archive.addfile(entry, BytesIO(kept))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
