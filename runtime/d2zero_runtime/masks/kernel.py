"""The Triton kernel that makes masks of mask logits; `masks.device` launches it. Imports Triton: import it when needed.

A pixel of a mask is looked up where it comes from, through both resizes, so that no map of the padded or the
output size is ever in memory: for 100 masks of 800×1216, 24 MB are read and 12 MB of bits written, where maps, bools,
sigmoids and their products are 4.6 GB. Both resizes are bilinear with align_corners false, as torch computes them.

A program makes a tile of one mask: its bits, and its part of the mask's stats, which are added up afterwards.

Letters: N masks, T tiles, h and w the logits' sides.
"""

import triton
import triton.language as tl

STATS = tl.constexpr(6)  # of a tile: pixels, sum of sigmoids, first column and row, end of columns and rows
FAR = tl.constexpr(1 << 24)  # beyond any column and row


@triton.jit
def neighbours(place, scale, length):
    """The two pixels around `place`, a pixel of the resized side, and the second one's weight."""
    source = tl.maximum((place + 0.5) * scale - 0.5, 0.0)
    first = source.to(tl.int32)
    return first, tl.minimum(first + 1, length - 1), source - first


@triton.jit
def enlarged(logits, y, x, real, stride, height, width, scale_y, scale_x):
    """Logits resized to the padded size, at rows y and columns x of it."""
    top, bottom, share_y = neighbours(y, scale_y, height)
    left, right, share_x = neighbours(x, scale_x, width)
    above, below = logits + top * stride, logits + bottom * stride
    upper = (1 - share_x) * tl.load(above + left, mask=real, other=0.0).to(tl.float32)
    upper += share_x * tl.load(above + right, mask=real, other=0.0).to(tl.float32)
    lower = (1 - share_x) * tl.load(below + left, mask=real, other=0.0).to(tl.float32)
    lower += share_x * tl.load(below + right, mask=real, other=0.0).to(tl.float32)
    return (1 - share_y) * upper + share_y * lower


# No size is a constant of the compiled kernel: none waits for a compiler.
@triton.jit(
    do_not_specialize=[
        "query_stride",
        "stride",
        "height",
        "width",
        "used_height",
        "used_width",
        "out_height",
        "out_width",
    ]
)
def mask_kernel(
    logits_Qhw,
    queries_N,
    packed,
    stats_NT6,
    query_stride,
    stride,
    height,
    width,
    scale_y,
    scale_x,
    used_height,
    used_width,
    out_scale_y,
    out_scale_x,
    out_height,
    out_width,
    RESIZED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One tile of ROWS rows and BYTES bytes of eight columns.

    `scale` is the logits' side over the padded one, `out_scale` the used side over the output's, if it is RESIZED.
    """
    mask, tile = tl.program_id(2), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    logits = logits_Qhw + tl.load(queries_N + mask).to(tl.int64) * query_stride
    y = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    byte = (tl.program_id(0) * BYTES + tl.arange(0, BYTES))[None, :]
    bits = tl.zeros((ROWS, BYTES), tl.int32)
    pixels = tl.zeros((ROWS, BYTES), tl.int32)
    sigmoids = tl.zeros((ROWS, BYTES), tl.float32)
    left = tl.full((ROWS, BYTES), FAR, tl.int32)
    right = tl.zeros((ROWS, BYTES), tl.int32)
    for bit in tl.static_range(8):  # a thread has all pixels of a byte
        x = byte * 8 + bit
        real = (y < out_height) & (x < out_width)
        if RESIZED:
            y0, y1, share_y = neighbours(y, out_scale_y, used_height)
            x0, x1, share_x = neighbours(x, out_scale_x, used_width)
            upper = (1 - share_x) * enlarged(logits, y0, x0, real, stride, height, width, scale_y, scale_x)
            upper += share_x * enlarged(logits, y0, x1, real, stride, height, width, scale_y, scale_x)
            lower = (1 - share_x) * enlarged(logits, y1, x0, real, stride, height, width, scale_y, scale_x)
            lower += share_x * enlarged(logits, y1, x1, real, stride, height, width, scale_y, scale_x)
            value = (1 - share_y) * upper + share_y * lower
        else:
            value = enlarged(logits, y, x, real, stride, height, width, scale_y, scale_x)
        inside = real & (value > 0)
        bits |= inside.to(tl.int32) << (7 - bit)
        pixels += inside.to(tl.int32)
        sigmoids += tl.where(inside, tl.sigmoid(value), 0.0)
        left = tl.minimum(left, tl.where(inside, x, FAR))
        right = tl.where(inside, x + 1, right)
    if PACKED:
        row_bytes = (out_width + 7) // 8
        at = (mask.to(tl.int64) * out_height + y) * row_bytes + byte
        tl.store(packed + at, bits.to(tl.uint8), mask=(y < out_height) & (byte < row_bytes))
    stats = stats_NT6 + (mask * tl.num_programs(0) * tl.num_programs(1) + tile) * STATS
    tl.store(stats, tl.sum(pixels).to(tl.float32))
    tl.store(stats + 1, tl.sum(sigmoids))
    tl.store(stats + 2, tl.min(left).to(tl.float32))
    tl.store(stats + 3, tl.min(tl.where(pixels > 0, y, FAR)).to(tl.float32))
    tl.store(stats + 4, tl.max(right).to(tl.float32))
    tl.store(stats + 5, tl.max(tl.where(pixels > 0, y + 1, 0)).to(tl.float32))
