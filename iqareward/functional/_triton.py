"""The kernels behind `fused`, in Triton; imported at the first use of a GPU, because not every torch brings Triton."""

# Triton's language has a compiler and types of its own.
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 32  # of a filter's tile: whole lines of cache, few of them shared with its neighbours, 8 outputs per thread
PIXELS = 2048  # of an image that one program cleans


# Triton would compile again for each size or stride that is a multiple of 16, which gains nothing here.
@triton.jit(
    do_not_specialize=[
        "source",
        "target",
        "plane_stride",
        "row_stride",
        "height",
        "width",
        "out_height",
        "out_width",
        "pad",
    ]
)
def correlate_tile(
    source,
    target,
    plane_stride,
    row_stride,
    column_stride,
    height,
    width,
    out_height,
    out_width,
    pad,
    TAPS: tl.constexpr,
    IS_VERTICAL: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """One tile of one plane: the sum over k of TAPS[k] * source[position + k - pad] along one dimension."""
    across = tl.cdiv(out_width, SIDE)
    down = tl.cdiv(out_height, SIDE)
    program = tl.program_id(0)
    plane = (program // (across * down)).to(tl.int64)
    top = program // across % down * SIDE
    left = program % across * SIDE
    rows = tl.arange(0, SIDE)[:, None]
    columns = tl.arange(0, SIDE)[None, :]
    inside = (top + rows < out_height) & (left + columns < out_width)
    # 64 bits once per tile: a batch may hold more than 2^31 elements
    source += plane * plane_stride + top.to(tl.int64) * row_stride + left.to(tl.int64) * column_stride
    target += (plane * out_height + top) * out_width + left
    total = tl.zeros((SIDE, SIDE), source.dtype.element_ty)
    for k in tl.static_range(len(TAPS)):
        if IS_VERTICAL:
            place, length = top + rows + (k - pad), height
            offset = (rows + (k - pad)) * row_stride + columns * column_stride
        else:
            place, length = left + columns + (k - pad), width
            offset = rows * row_stride + (columns + (k - pad)) * column_stride
        total += TAPS[k] * tl.load(source + offset, inside & (place >= 0) & (place < length), other=0.0)
    tl.store(target + rows * out_width + columns, total, inside)


@triton.jit
def ssim_ratio(sums, differences, CONSTANT: tl.constexpr) -> tl.tensor:
    """As `iqareward.functional.ssim` has it; division rounds to the nearest, which is not Triton's default."""
    above, below = sums - differences + CONSTANT, sums + differences + CONSTANT
    if sums.dtype == tl.float32:
        return tl.div_rn(above, below)
    return above / below


@triton.jit
def ssim_block(
    means, powers, target, size, C1: tl.constexpr, C2: tl.constexpr, WITH_LUMINANCE: tl.constexpr, PIXELS: tl.constexpr
) -> None:
    """Contrast and structure, times luminance, in one block of the maps of sums and of differences."""
    places = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = places < size
    mean_sum, mean_difference = tl.load(means + places, inside), tl.load(means + size + places, inside)
    sums = tl.load(powers + places, inside) - mean_sum * mean_sum
    differences = tl.load(powers + size + places, inside) - mean_difference * mean_difference
    # NaN is not below 0, and stays
    ratio = ssim_ratio(tl.where(sums < 0, 0, sums), tl.where(differences < 0, 0, differences), C2)
    if WITH_LUMINANCE:
        ratio *= ssim_ratio((mean_sum + 1) * (mean_sum + 1), mean_difference * mean_difference, C1)
    tl.store(target + places, ratio, inside)


@triton.jit(do_not_specialize=["images", "blocks"])
def clean_block(
    first,
    second,
    target,
    flags,
    images,
    size,
    blocks,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    """Clamp one block of one image to [0, 1] in float32, and flag it if every pixel lies within [LOW, HIGH]."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    places = program % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = places < size
    if image < images:
        pixels = tl.load(first + image * size + places, inside, other=0.0).to(tl.float32)
    else:
        pixels = tl.load(second + (image - images) * size + places, inside, other=0.0).to(tl.float32)
    accepted = (pixels >= LOW) & (pixels <= HIGH)  # comparisons with NaN are False
    tl.store(flags + program, tl.min(accepted.to(tl.int32), 0).to(tl.int8))
    tl.store(target + image * size + places, tl.minimum(tl.maximum(pixels, 0.0), 1.0), inside)


@triton.jit(do_not_specialize=["blocks", "shares"])
def grey_unless_valid(target, flags, valid, size, blocks, shares, PIXELS: tl.constexpr) -> None:
    """Write whether all blocks of an image are flagged; if not, paint a share of its blocks mid-grey."""
    program = tl.program_id(0)
    image = (program // shares).to(tl.int64)
    all_flagged = tl.full((PIXELS,), 1, tl.int8)
    for start in range(0, blocks, PIXELS):
        others = start + tl.arange(0, PIXELS)
        all_flagged &= tl.load(flags + image * blocks + others, others < blocks, other=1)
    is_valid = tl.min(all_flagged.to(tl.int32), 0)
    tl.store(valid + image, is_valid.to(tl.int8))
    if is_valid == 0:
        for block in range(program % shares, blocks, shares):
            places = block * PIXELS + tl.arange(0, PIXELS)
            tl.store(target + image * size + places, tl.full((PIXELS,), 0.5, tl.float32), places < size)


def correlate(maps: Tensor, taps: tuple[float, ...], is_vertical: bool, pad: int, result: Tensor) -> None:
    """Launch the filter of `maps` `[N, H, W]`, of any strides, into the contiguous `result`."""
    planes, height, width = result.shape
    grid = planes * triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
    options = {"TAPS": taps, "IS_VERTICAL": is_vertical, "SIDE": SIDE, "enable_fp_fusion": True}
    correlate_tile[(grid,)](maps, result, *maps.stride(), *maps.shape[1:], height, width, pad, **options)


def ssim_map(means: Tensor, powers: Tensor, c1: float, c2: float, with_luminance: bool, result: Tensor) -> None:
    """Launch SSIM's map of contiguous means and powers `[2, ...]` into the contiguous `result`, with torch's digits."""
    size = result.numel()
    options = {"C1": c1, "C2": c2, "WITH_LUMINANCE": with_luminance, "PIXELS": 1024, "enable_fp_fusion": False}
    ssim_block[(triton.cdiv(size, 1024),)](means, powers, result, size, **options)


def clean(batches: list[Tensor], low: float, high: float, result: Tensor, valid: Tensor) -> None:
    """Launch the cleaning of one or two contiguous batches of one shape into contiguous `[n, B, 3, H, W]`, `[n, B]`."""
    images = batches[0].shape[0]
    size = batches[0].numel() // images
    blocks = triton.cdiv(size, PIXELS)
    flags = torch.empty(valid.numel() * blocks, dtype=torch.int8, device=valid.device)
    clean_block[(flags.numel(),)](
        batches[0], batches[-1], result, flags, images, size, blocks, low, high, PIXELS, enable_fp_fusion=True
    )
    shares = min(blocks, 16)
    grey_unless_valid[(valid.numel() * shares,)](
        result, flags, valid.view(torch.int8), size, blocks, shares, PIXELS, enable_fp_fusion=True
    )
