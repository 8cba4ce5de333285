"""The Triton kernels of multi-scale deformable attention; `operator` checks arguments and launches them.

A program handles a block of neighbouring queries of one head of one image. The channels of a pixel's head
are adjacent in memory, so each corner of a sample is one contiguous read, and neighbouring queries read
neighbouring pixels. With (H, W) the level's size, a sample's value and its derivatives are

    x = location_x · W − 1/2,  y = location_y · H − 1/2,  fx = x − ⌊x⌋,  fy = y − ⌊y⌋
    v = (1−fy)·((1−fx)·v00 + fx·v01) + fy·((1−fx)·v10 + fx·v11),  v_yx the four pixels around, 0 off the map
    dv/dlocation_x = W·((1−fy)·(v01−v00) + fy·(v11−v10)),  dv/dlocation_y = H·((1−fx)·(v10−v00) + fx·(v11−v01))

Coordinates and sums are float32 whatever the values are. Rows of memory are addressed with 64 bits.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels per head, R queries, L levels, P points;
in the kernels QUERIES and CHANNELS are the sides of a program's tile, CHANNELS the power of two from N up.
"""

import triton
import triton.language as tl


@triton.jit
def corner(x, y, height, width, start, real, ROW: tl.constexpr):
    """The address of pixel (x, y), whole numbers in float32, and whether it is on the map.

    Compared as floats: a coordinate that no integer holds is off the map, not somewhere on it.
    """
    inside = real & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = start + y.to(tl.int32) * tl.cast(width, tl.int32) + x.to(tl.int32)
    return pixel.to(tl.int64) * ROW, inside


@triton.jit
def corners(locations, sample, height, width, start, real, ROW: tl.constexpr):
    """The four corners of one sample per query: memory rows, on the map or not, and the fractions fx, fy."""
    x = tl.load(locations + 2 * sample, mask=real, other=0.0) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=real, other=0.0) * height - 0.5
    x0, y0 = tl.floor(x), tl.floor(y)
    row00, inside00 = corner(x0, y0, height, width, start, real, ROW)
    row01, inside01 = corner(x0 + 1, y0, height, width, start, real, ROW)
    row10, inside10 = corner(x0, y0 + 1, height, width, start, real, ROW)
    row11, inside11 = corner(x0 + 1, y0 + 1, height, width, start, real, ROW)
    return row00, row01, row10, row11, inside00, inside01, inside10, inside11, x - x0, y - y0


@triton.jit
def read(values, row, inside, some):
    """The channels of one pixel per query in float32, 0 off the map."""
    return tl.load(values + row[:, None], mask=inside[:, None] & some, other=0.0).to(tl.float32)


# Triton compiles again for integers of other divisibility, unless told not to, and inside tuples even then, but
# not for other floats: so `sizes` are whole numbers in float32, and no image size waits for a compiler.
@triton.jit(do_not_specialize=["total", "queries"])
def forward_kernel(
    values_BSMN,
    locations_BRMLP2,
    weights_BRMLP,
    out_BRMN,
    sizes,
    total,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sample and add up. `sizes` is (H, W, H, W, …) in float32, `total` S, `queries` R, WIDTH N."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)[None, :]
    real, some = query < queries, channel < WIDTH
    row = (image * queries + query) * HEADS + head
    values = values_BSMN + (image * total * HEADS + head) * WIDTH + channel
    out = tl.zeros((QUERIES, CHANNELS), tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        for point in tl.static_range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights_BRMLP + sample, mask=real, other=0.0)
            row00, row01, row10, row11, inside00, inside01, inside10, inside11, fx, fy = corners(
                locations_BRMLP2, sample, height, width, start, real, HEADS * WIDTH
            )
            out += (weight * (1 - fy) * (1 - fx))[:, None] * read(values, row00, inside00, some)
            out += (weight * (1 - fy) * fx)[:, None] * read(values, row01, inside01, some)
            out += (weight * fy * (1 - fx))[:, None] * read(values, row10, inside10, some)
            out += (weight * fy * fx)[:, None] * read(values, row11, inside11, some)
        start += tl.cast(height, tl.int32) * tl.cast(width, tl.int32)
    out_at = out_BRMN + row[:, None] * WIDTH + channel
    tl.store(out_at, out.to(out_BRMN.dtype.element_ty), mask=real[:, None] & some)


@triton.jit
def add(grad_values, row, inside, some, share, grad):
    """Add a corner's share of the gradient to its pixel; programs meet at pixels, hence atomically."""
    # relaxed: nothing is read back, so the sums need no order
    tl.atomic_add(grad_values + row[:, None], share[:, None] * grad, mask=inside[:, None] & some, sem="relaxed")


@triton.jit(do_not_specialize=["total", "queries"])
def backward_kernel(
    grad_BRMN,
    values_BSMN,
    locations_BRMLP2,
    weights_BRMLP,
    grad_values_BSMN,
    grad_locations_BRMLP2,
    grad_weights_BRMLP,
    sizes,
    total,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All three gradients. `grad_values_BSMN` is float32 and zero at the start; the others are overwritten."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)[None, :]
    real, some = query < queries, channel < WIDTH
    row = (image * queries + query) * HEADS + head
    first = (image * total * HEADS + head) * WIDTH + channel
    values, grad_values = values_BSMN + first, grad_values_BSMN + first
    grad = tl.load(grad_BRMN + row[:, None] * WIDTH + channel, mask=real[:, None] & some, other=0.0).to(tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        for point in tl.static_range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights_BRMLP + sample, mask=real, other=0.0)
            row00, row01, row10, row11, inside00, inside01, inside10, inside11, fx, fy = corners(
                locations_BRMLP2, sample, height, width, start, real, HEADS * WIDTH
            )
            v00, v01 = read(values, row00, inside00, some), read(values, row01, inside01, some)
            v10, v11 = read(values, row10, inside10, some), read(values, row11, inside11, some)
            fx_, fy_ = fx[:, None], fy[:, None]
            top, bottom = v00 + fx_ * (v01 - v00), v10 + fx_ * (v11 - v10)
            along_x = (1 - fy_) * (v01 - v00) + fy_ * (v11 - v10)
            grad_x = tl.sum(grad * along_x, 1) * weight * width
            grad_y = tl.sum(grad * (bottom - top), 1) * weight * height
            tl.store(grad_locations_BRMLP2 + 2 * sample, grad_x, mask=real)
            tl.store(grad_locations_BRMLP2 + 2 * sample + 1, grad_y, mask=real)
            grad_weight = tl.sum(grad * ((1 - fy_) * top + fy_ * bottom), 1)
            tl.store(grad_weights_BRMLP + sample, grad_weight, mask=real)
            add(grad_values, row00, inside00, some, weight * (1 - fy) * (1 - fx), grad)
            add(grad_values, row01, inside01, some, weight * (1 - fy) * fx, grad)
            add(grad_values, row10, inside10, some, weight * fy * (1 - fx), grad)
            add(grad_values, row11, inside11, some, weight * fy * fx, grad)
        start += tl.cast(height, tl.int32) * tl.cast(width, tl.int32)
