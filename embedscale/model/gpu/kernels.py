"""Kernels in Triton for what moves most bytes in a step of GPT-NeoX: attention of short texts, and norms with sums.

At the paper's lengths a step is bound by memory traffic (docs/gpu.md). Each kernel reads its inputs once and writes its
results once:

- `attend` reads queries, keys and values where the dense layer wrote them, turns queries and keys by their positions,
  and computes one sequence and head in one program, all of it on the chip. Its backward pass computes the scores again,
  needs no buffer, and adds in one order, so that equal inputs give equal bits.
- `add_norms` adds a block's two outputs to the residual and applies the next block's two norms to the sum.

All sums are float32. A program's tile is a power of two, so sequences run in classes of similar length; they are sorted
by length, so a class is a range (`classes_of`). With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedscale.model.packing import Run

LONGEST = 128  # tokens: the largest tile
WIDEST = 128  # numbers of a head: the largest tile
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # from TRITON_INTERPRET
PROGRAMS = 512  # of the norms' backward pass; a constant, so that the order of its sums is the same on every GPU


def classes_of(runs: Sequence[Run]) -> list[int]:
    """Return (first sequence, number of sequences, tile) of each class of lengths, one after the other."""
    found: list[int] = []
    first = 0
    for run in runs:
        count = (run.stop - run.start) // run.length
        tile = max(16, triton.next_power_of_2(run.length))
        if found and found[-1] == tile:
            found[-2] += count
        else:
            found += [first, count, tile]
        first += count
    return found


@triton.jit
def _product(left, right):
    """Return a matrix product, summed in float32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 as whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")  # no tf32


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """Return float32 numbers as `kind`, float32 or bf16, rounded to the nearest."""
    if INTERPRETED and kind == tl.bfloat16:  # the interpreter would cut digits off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(kind)


@triton.jit
def _columns(TURNS: tl.constexpr, WIDTH: tl.constexpr):
    """Return each column of a head, the column that it turns with, and the sign of that one's part."""
    column = tl.arange(0, WIDTH)[None, :]
    half: tl.constexpr = TURNS // 2
    partner = tl.where(column < half, column + half, tl.where(column < TURNS, column - half, column))
    sign = tl.where(column < half, -1.0, tl.where(column < TURNS, 1.0, 0.0))
    return column, partner, sign


@triton.jit
def _angles(cos, sin, start, row, inside, column, sign, TURNS: tl.constexpr):
    """Return cos, and sin with its sign, float32 [TILE, WIDTH]; 1 and 0 for columns that do not turn."""
    at, turning = start.to(tl.int64) * TURNS + row * TURNS + column, inside & (column < TURNS)
    return tl.load(cos + at, mask=turning, other=1.0), tl.load(sin + at, mask=turning, other=0.0) * sign


@triton.jit
def _turned(states, row, column, partner, inside, c, s):
    """Return queries or keys after the turn, [TILE, WIDTH] of the type of `states`."""
    mine = tl.load(states + row + column, mask=inside, other=0.0) * c
    return _rounded(mine + tl.load(states + row + partner, mask=inside, other=0.0) * s, states.dtype.element_ty)


@triton.jit
def _turned_partner(states, row, column, partner, inside, c, s):
    """Return what `_turned` gives, each column in its partner's place."""
    other = tl.load(states + row + partner, mask=inside, other=0.0) * c
    return _rounded(other - tl.load(states + row + column, mask=inside, other=0.0) * s, states.dtype.element_ty)


@triton.jit
def _probabilities(query, key, token, length, scaling, TILE: tl.constexpr):
    """Return causal attention, float32 [TILE, TILE]."""
    earlier = tl.arange(0, TILE)[None, :]
    scores = _product(query, tl.trans(key)) * scaling
    scores = tl.where((token >= earlier) & (earlier < length), scores, float("-inf"))
    found = tl.exp(scores - tl.max(scores, 1)[:, None])
    return found / tl.sum(found, 1)[:, None]


@triton.jit
def _tile(cos, sin, ends, begin, SIZE: tl.constexpr, TURNS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the first token and the length of this program's sequence, and what `_turned` takes for its tile."""
    sequence = tl.program_id(0) + begin
    start = tl.load(ends + sequence)
    length = tl.load(ends + sequence + 1) - start
    token = tl.arange(0, TILE)[:, None]
    column, partner, sign = _columns(TURNS, WIDTH)
    inside = (token < length) & (column < SIZE)
    c, s = _angles(cos, sin, start, token, inside, column, sign, TURNS)
    return start, length, token, column, partner, inside, c, s


@triton.jit(do_not_specialize=["begin"])
def _attend(states, cos, sin, ends, out, begin, heads, scaling,
            SIZE: tl.constexpr, TURNS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    start, length, token, column, partner, inside, c, s = _tile(cos, sin, ends, begin, SIZE, TURNS, TILE, WIDTH)
    kind = states.dtype.element_ty
    states += (start.to(tl.int64) * heads + head) * (3 * SIZE)
    row = token * (heads * 3 * SIZE)
    query = _turned(states, row, column, partner, inside, c, s)
    key = _turned(states + SIZE, row, column, partner, inside, c, s)
    share = _probabilities(query, key, token, length, scaling, TILE)
    value = tl.load(states + 2 * SIZE + row + column, mask=inside, other=0.0)
    found = _product(_rounded(share, kind), value)
    out += (start.to(tl.int64) * heads + head) * SIZE
    tl.store(out + token * (heads * SIZE) + column, _rounded(found, kind), mask=inside)


@triton.jit(do_not_specialize=["begin"])
def _attend_backward(states, cos, sin, ends, gradient, found, begin, heads, scaling,
                     SIZE: tl.constexpr, TURNS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    start, length, token, column, partner, inside, c, s = _tile(cos, sin, ends, begin, SIZE, TURNS, TILE, WIDTH)
    kind = states.dtype.element_ty
    at = (start.to(tl.int64) * heads + head) * (3 * SIZE)
    states, found = states + at, found + at
    row = token * (heads * 3 * SIZE)
    query = _turned(states, row, column, partner, inside, c, s)
    key = _turned(states + SIZE, row, column, partner, inside, c, s)
    share = _probabilities(query, key, token, length, scaling, TILE)
    gradient += (start.to(tl.int64) * heads + head) * SIZE
    upper = tl.load(gradient + token * (heads * SIZE) + column, mask=inside, other=0.0)
    of_value = _product(tl.trans(_rounded(share, kind)), upper)
    tl.store(found + 2 * SIZE + row + column, _rounded(of_value, kind), mask=inside)
    value = tl.load(states + 2 * SIZE + row + column, mask=inside, other=0.0)
    of_share = _product(upper, tl.trans(value))
    of_scores = _rounded(share * (of_share - tl.sum(share * of_share, 1)[:, None]) * scaling, kind)
    # The turn's backward pass needs a column's gradient and its partner's. A tile's columns cannot change places, so
    # the partner's comes from a product with columns that are loaded in exchanged places.
    of_query = _product(of_scores, key) * c
    of_query -= _product(of_scores, _turned_partner(states + SIZE, row, column, partner, inside, c, s)) * s
    tl.store(found + row + column, _rounded(of_query, kind), mask=inside)
    of_scores = tl.trans(of_scores)
    of_key = _product(of_scores, query) * c
    of_key -= _product(of_scores, _turned_partner(states, row, column, partner, inside, c, s)) * s
    tl.store(found + SIZE + row + column, _rounded(of_key, kind), mask=inside)


@torch.library.custom_op("embedscale::attend", mutates_args=())
def attend(
    states: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, classes: list[int], size: int, scaling: float
) -> Tensor:
    """Return causal attention inside each sequence, [T, heads x size].

    `states` [T, heads x 3 x size] holds a query, a key and a value for each head. `cos` and `sin`, float32
    [T, numbers that turn], are those of the positions, both halves equal. `ends` and `classes` are of the chunk.
    """
    out = states.new_empty(len(states), states.shape[1] // 3)
    heads, width = states.shape[1] // (3 * size), triton.next_power_of_2(size)
    for begin, count, tile in zip(classes[::3], classes[1::3], classes[2::3], strict=True):
        _attend[(count, heads)](
            states, cos, sin, ends, out, begin, heads, scaling, size, cos.shape[1], tile, width,
            num_warps=warps_of(tile, width),
        )  # fmt: skip
    return out


@torch.library.custom_op("embedscale::attend_backward", mutates_args=())
def attend_backward(
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    ends: Tensor,
    gradient: Tensor,
    classes: list[int],
    size: int,
    scaling: float,
) -> Tensor:
    """Return the gradient of `states`, given that of the output of `attend`."""
    found = torch.empty_like(states)
    heads, width = states.shape[1] // (3 * size), triton.next_power_of_2(size)
    for begin, count, tile in zip(classes[::3], classes[1::3], classes[2::3], strict=True):
        _attend_backward[(count, heads)](
            states, cos, sin, ends, gradient, found, begin, heads, scaling, size, cos.shape[1], tile, width,
            num_warps=warps_of(tile, width),
        )  # fmt: skip
    return found


def warps_of(tile: int, width: int) -> int:
    """Return the warps of a program. Their number keeps the tiles of heads of up to 64 numbers in registers."""
    return min(16, max(2, tile * max(width, 64) // 512))


@attend.register_fake
def _(states, cos, sin, ends, classes, size, scaling):
    return states.new_empty(len(states), states.shape[1] // 3)


@attend_backward.register_fake
def _(states, cos, sin, ends, gradient, classes, size, scaling):
    return torch.empty_like(states)


@triton.jit
def _add_norms(inputs, first, second, weight1, bias1, weight2, bias2, total, norm1, norm2, means, scales,
               width, eps, ADDS: tl.constexpr, TWO: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = row * width + column
    x = tl.load(inputs + at, mask=inside, other=0.0)
    if ADDS:
        x += tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, x, mask=inside)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)
    normal = centred * scale
    kind = norm1.dtype.element_ty
    y = normal * tl.load(weight1 + column, mask=inside, other=0.0) + tl.load(bias1 + column, mask=inside, other=0.0)
    tl.store(norm1 + at, _rounded(y, kind), mask=inside)
    if TWO:
        y = normal * tl.load(weight2 + column, mask=inside, other=0.0) + tl.load(bias2 + column, mask=inside, other=0.0)
        tl.store(norm2 + at, _rounded(y, kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_norms_backward(total, means, scales, upper, upper1, upper2, weight1, weight2, found, half, sums,
                        rows, width, UPPER: tl.constexpr, TWO: tl.constexpr, HALF: tl.constexpr, SUMS: tl.constexpr,
                        WIDTH: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    w1 = tl.load(weight1 + column, mask=inside, other=0.0)
    weights1 = tl.zeros([WIDTH], tl.float32)
    biases1, weights2, biases2 = weights1, weights1, weights1
    if TWO:
        w2 = tl.load(weight2 + column, mask=inside, other=0.0)
    wide = width.to(tl.int64)
    for row in range(program, rows, PROGRAMS):
        at = row * wide + column
        scale = tl.load(scales + row)
        normal = (tl.load(total + at, mask=inside, other=0.0) - tl.load(means + row)) * scale
        normal = tl.where(inside, normal, 0.0)
        g1 = tl.load(upper1 + at, mask=inside, other=0.0).to(tl.float32)
        g = g1 * w1
        if SUMS:
            weights1 += g1 * normal
            biases1 += g1
        if TWO:
            g2 = tl.load(upper2 + at, mask=inside, other=0.0).to(tl.float32)
            g += g2 * w2
            if SUMS:
                weights2 += g2 * normal
                biases2 += g2
        x = scale * (g - tl.sum(g, 0) / width - normal * (tl.sum(g * normal, 0) / width))
        if UPPER:
            x += tl.load(upper + at, mask=inside, other=0.0)
        tl.store(found + at, x, mask=inside)
        if HALF:
            tl.store(half + at, _rounded(x, half.dtype.element_ty), mask=inside)
    if SUMS:
        at = program * 4 * width + column
        tl.store(sums + at, weights1, mask=inside)
        tl.store(sums + at + width, biases1, mask=inside)
        tl.store(sums + at + 2 * width, weights2, mask=inside)
        tl.store(sums + at + 3 * width, biases2, mask=inside)


@torch.library.custom_op("embedscale::add_norms", mutates_args=())
def add_norms(
    inputs: Tensor,
    outputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add `outputs` (none or two) to the residual, and apply one or two norms to the sum.

    `inputs` is float32 [T, width]; `outputs` [T, width] may be bf16; `weights` and `biases` [width] are float32.
    Returns the sum (empty without `outputs`), two norms as `dtype` (the second empty without a second weight), and each
    row's mean and 1 / standard deviation.
    """
    rows, width = inputs.shape
    total = torch.empty_like(inputs) if outputs else inputs.new_empty(0)
    norm1 = torch.empty_like(inputs, dtype=dtype)
    norm2 = torch.empty_like(norm1) if len(weights) == 2 else norm1.new_empty(0)
    means, scales = inputs.new_empty(rows), inputs.new_empty(rows)
    first, second = outputs or (inputs, inputs)
    tile = triton.next_power_of_2(width)
    _add_norms[(rows,)](
        inputs, first, second, weights[0], biases[0], weights[-1], biases[-1], total, norm1, norm2, means, scales,
        width, eps, bool(outputs), len(weights) == 2, tile, num_warps=_norm_warps(tile),
    )  # fmt: skip
    return total, norm1, norm2, means, scales


@torch.library.custom_op("embedscale::add_norms_backward", mutates_args=())
def add_norms_backward(
    total: Tensor,
    means: Tensor,
    scales: Tensor,
    of_total: Tensor | None,
    of_norms: list[Tensor],
    weights: list[Tensor],
    half: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the residual, the same as `half` for the outputs that were added, and those of weights.

    The last is float32 [4, width]: of the first norm's weight and bias, and of the second's. Without `half` or `sums`
    the tensor is empty.
    """
    rows, width = total.shape
    found = torch.empty_like(total)
    halves = total.new_empty((rows, width) if half else 0, dtype=half or total.dtype)
    programs = min(PROGRAMS, rows)
    parts = total.new_empty((programs, 4, width) if sums else 0)
    tile = triton.next_power_of_2(width)
    _add_norms_backward[(programs,)](
        total, means, scales, total if of_total is None else of_total, of_norms[0], of_norms[-1], weights[0],
        weights[-1], found, halves, parts, rows, width, of_total is not None, len(weights) == 2, half is not None, sums,
        tile, programs, num_warps=_norm_warps(tile),
    )  # fmt: skip
    return found, halves, parts.sum(0) if sums else parts


def _norm_warps(tile: int) -> int:
    return min(8, max(1, tile // 256))


@add_norms.register_fake
def _(inputs, outputs, weights, biases, eps, dtype):
    total = torch.empty_like(inputs) if outputs else inputs.new_empty(0)
    norm1 = torch.empty_like(inputs, dtype=dtype)
    norm2 = torch.empty_like(norm1) if len(weights) == 2 else norm1.new_empty(0)
    return total, norm1, norm2, inputs.new_empty(len(inputs)), inputs.new_empty(len(inputs))


@add_norms_backward.register_fake
def _(total, means, scales, of_total, of_norms, weights, half, sums):
    return (
        torch.empty_like(total),
        total.new_empty(total.shape if half else 0, dtype=half or total.dtype),
        total.new_empty((4, total.shape[1]) if sums else 0),
    )
