"""The Triton kernels of masked cross-attention; `operator` checks arguments and launches them.

A hundred queries attend to up to 15 200 keys in eight heads: few programs if each had all keys of a head. So the keys
are split. A program has a block of queries of one head and one split of the keys, which it reads in tiles as flash
attention does (online softmax), and writes its unnormalised sum with the largest score and the sum of powers. A second
kernel combines the splits; the result is that of all keys together (log-sum-exp), not an approximation.

A key is blocked for a query where the query's mask logit is negative, which the first kernel looks up itself: no mask
is ever in memory. Scores, powers and sums are float32 whatever the inputs are.

Letters: B batch, Q queries, N keys, H heads, W channels per head, S splits of the keys.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["keys", "split_keys", "key_batch", "value_batch"])
def split_kernel(
    queries_BQC,
    keys_BNC,
    values_BNC,
    mask_logits_BQN,
    open_BQ,
    sums_SBHQW,
    tops_SBHQ,
    powers_SBHQ,
    queries,
    keys,
    split_keys,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of QUERIES queries of one head over one split of `split_keys` keys.

    `open_BQ` marks queries that are blocked everywhere and so attend everywhere. `scale` has log2(e) in it. CHANNELS
    is the power of two from WIDTH up; PRECISION is how float32 is multiplied, `ieee` or `tf32`.
    """
    head, block, image = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS, tl.program_id(2).to(tl.int64)
    query, channel = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    real, some = query < queries, channel < WIDTH
    at = head * WIDTH + channel
    asked = tl.load(
        queries_BQC + image * query_batch + query[:, None] * query_row + at[None, :],
        mask=real[:, None] & some[None, :],
        other=0.0,
    )
    row = image * queries + query
    everywhere = tl.load(open_BQ + row, mask=real, other=1) != 0
    top = tl.full((QUERIES,), NOTHING, tl.float32)
    power = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, CHANNELS), tl.float32)
    first = tl.program_id(0) * split_keys
    last = tl.minimum(first + split_keys, keys)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < last
        read = tl.load(
            keys_BNC + image * key_batch + key[None, :].to(tl.int64) * key_row + at[:, None],
            mask=there[None, :] & some[:, None],
            other=0.0,
        )
        logit = tl.load(
            mask_logits_BQN + row[:, None] * keys + key[None, :], mask=real[:, None] & there[None, :], other=0.0
        )
        score = tl.dot(asked, read, input_precision=PRECISION) * scale
        allowed = there[None, :] & ((logit >= 0) | (logit != logit) | everywhere[:, None])
        score = tl.where(allowed, score, NOTHING)
        higher = tl.maximum(top, tl.max(score, 1))
        level = tl.where(higher == NOTHING, 0.0, higher)  # -inf - -inf is no number
        share = tl.exp2(score - level[:, None])
        kept = tl.exp2(top - level)
        value = tl.load(
            values_BNC + image * value_batch + key[:, None].to(tl.int64) * value_row + at[None, :],
            mask=there[:, None] & some[None, :],
            other=0.0,
        )
        power = power * kept + tl.sum(share, 1)
        total = total * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    place = ((tl.program_id(0) * tl.num_programs(2) + image) * HEADS + head) * queries + query
    tl.store(tops_SBHQ + place, top, mask=real)
    tl.store(powers_SBHQ + place, power, mask=real)
    tl.store(sums_SBHQW + place[:, None] * WIDTH + channel[None, :], total, mask=real[:, None] & some[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    sums_SBHQW,
    tops_SBHQ,
    powers_SBHQ,
    out_BQC,
    rows,
    splits,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS of the B·H·Q rows: the splits' sums, each weighted by its part of all powers. SPLITS is a power of two."""
    row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPLITS)
    channel = tl.arange(0, CHANNELS)
    real, some = row < rows, channel < WIDTH
    there = (split < splits)[:, None] & real[None, :]
    place = split[:, None].to(tl.int64) * rows + row[None, :]
    tops = tl.load(tops_SBHQ + place, mask=there, other=NOTHING)
    powers = tl.load(powers_SBHQ + place, mask=there, other=0.0)
    sums = tl.load(
        sums_SBHQW + place[:, :, None] * WIDTH + channel[None, None, :],
        mask=there[:, :, None] & some[None, None, :],
        other=0.0,
    )
    weights = tl.exp2(tops - tl.max(tops, 0)[None, :])
    weights = tl.where(there, weights, 0.0)
    out = tl.sum(weights[:, :, None] * sums, 0) / tl.sum(weights * powers, 0)[:, None]
    query, head, image = row % queries, (row // queries) % HEADS, row // (queries * HEADS)
    at = (image * queries + query).to(tl.int64) * (HEADS * WIDTH) + head * WIDTH
    tl.store(
        out_BQC + at[:, None] + channel[None, :],
        out.to(out_BQC.dtype.element_ty),
        mask=real[:, None] & some[None, :],
    )
