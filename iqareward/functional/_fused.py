"""Operators that are one or two kernels on a GPU, where torch's own would pass over memory once per operation.

Other devices get the same in plain torch, and so does `torch.compile`, whose own fusion is as good. So does a GPU where
Triton is not installed (torch for Windows), or, after a warning, where it cannot compile (no C compiler, say).
`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels on a CPU, slowly, to test them without a GPU.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward._gradients import clamp, differentiated
from iqareward.functional._chunks import free_threads

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))  # since torch 2.8
_unusable: list[str] = []  # why this process cannot use Triton, once that is known

# Operators, so that fake tensors and whoever counts or traces operators see them.
_library = torch.library.Library("iqareward", "DEF")
_library.define("correlate(Tensor maps, float[] taps, bool is_vertical, int pad) -> Tensor")
_library.define("ssim_map(Tensor means, Tensor powers, float c1, float c2, bool with_luminance) -> Tensor")
_library.define("clean(Tensor[] batches, float low, float high) -> (Tensor, Tensor)")


def on_gpu(tensor: Tensor) -> bool:
    """Whether few launches count most: eager operations on a GPU."""
    return (tensor.is_cuda or _INTERPRETED) and not torch.compiler.is_compiling()


def fuses(tensor: Tensor) -> bool:
    """Whether an operator without derivatives and without a plain form here may take the place of torch's own."""
    return on_gpu(tensor) and not differentiated(tensor) and not _unusable


def correlate(maps: Tensor, taps: Sequence[float], *, is_vertical: bool) -> Tensor:
    """Correlate columns or rows of `maps` `[..., H, W]` with `taps`, with derivatives of every kind and order.

    The dimension shrinks by `len(taps) - 1` because no border is made up.
    """
    if on_gpu(maps) and maps.dtype in (torch.float32, torch.float64):
        return cast(Tensor, _Correlate.apply(maps, tuple(taps), is_vertical, 0))
    return _plain_correlate(maps, taps, is_vertical, 0)


def clean(batches: Sequence[Tensor], low: float, high: float) -> tuple[list[Tensor], Tensor]:
    """Clamp images to [0, 1] in float32, and paint those mid-grey that have a pixel outside [low, high] or NaN.

    Args:
        batches: `[B, 3, H, W]` each, of one shape and any floating dtypes.
        low: at most 0.
        high: at least 1.

    Returns:
        The clean batches, whose gradient reaches the pixels in [0, 1] of images that were not painted; and `[n, B]`
        bool, which images of which batch those are.
    """
    if not on_gpu(batches[0]):
        pairs = [_plain_clean(images, low, high) for images in batches]
        return [cleaned for cleaned, _ in pairs], torch.stack([valid for _, valid in pairs])
    if len({images.dtype for images in batches}) > 1:
        batches = [images.float() for images in batches]
    stacked, valid = torch.ops.iqareward.clean([images.detach() for images in batches], low, high)
    cleaned = [stacked[index] for index in range(len(batches))]
    if any(differentiated(images) for images in batches):
        # equal to the clean pixel: inside [0, 1], bounds included
        kept = [images.float() for images in batches]
        passes = [(pixels == values) & ok[:, None, None, None] for pixels, values, ok in zip(kept, cleaned, valid)]
        cleaned = [torch.where(*triple) for triple in zip(passes, kept, cleaned)]
    return cleaned, valid


class _Correlate(torch.autograd.Function):
    """A correlation is linear, and its transpose is a correlation: taps reversed, zeros beyond the border or none."""

    @staticmethod
    def forward(maps: Tensor, taps: tuple[float, ...], is_vertical: bool, pad: int) -> Tensor:
        return torch.ops.iqareward.correlate(maps, taps, is_vertical, pad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        taps, is_vertical, pad = ctx.options
        return _Correlate.apply(gradients[0], taps[::-1], is_vertical, len(taps) - 1 - pad), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Correlate.apply(tangents[0], *ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _Correlate.apply(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), 0


def _correlate(maps: Tensor, taps: Sequence[float], is_vertical: bool, pad: int) -> Tensor:
    planes = maps.reshape(-1, *maps.shape[-2:])
    result = _empty_correlate(planes, taps, is_vertical, pad)
    if not _launched(result, lambda triton: triton.correlate(planes, tuple(taps), is_vertical, pad, result)):
        result = _plain_correlate(planes, taps, is_vertical, pad)
    return result.view(*maps.shape[:-2], *result.shape[-2:])


def _empty_correlate(maps: Tensor, taps: Sequence[float], is_vertical: bool, pad: int) -> Tensor:
    shape = list(maps.shape)
    shape[-2 if is_vertical else -1] += 2 * pad - len(taps) + 1
    return maps.new_empty(shape)


def _plain_correlate(maps: Tensor, taps: Sequence[float], is_vertical: bool, pad: int) -> Tensor:
    dim = -2 if is_vertical else -1
    if pad:
        maps = F.pad(maps, (0, 0, pad, pad) if is_vertical else (pad, pad))
    length = maps.shape[dim] - len(taps) + 1
    result = maps.narrow(dim, 0, length) * taps[0]
    for offset, tap in enumerate(taps[1:], start=1):
        result.add_(maps.narrow(dim, offset, length), alpha=tap)
    return result


def _clean(batches: list[Tensor], low: float, high: float) -> tuple[Tensor, Tensor]:
    batches = [images.contiguous() for images in batches]
    result, valid = _empty_clean(batches, low, high)
    if not _launched(result, lambda triton: triton.clean(batches, low, high, result, valid)):
        pairs = [_plain_clean(images, low, high) for images in batches]
        return torch.stack([cleaned for cleaned, _ in pairs]), torch.stack([valid for _, valid in pairs])
    return result, valid


def _empty_clean(batches: list[Tensor], low: float, high: float) -> tuple[Tensor, Tensor]:
    shape, first = (len(batches), *batches[0].shape), batches[0]
    return first.new_empty(shape, dtype=torch.float32), first.new_empty(shape[:2], dtype=torch.bool)


def _plain_clean(images: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    with free_threads(images.device):
        images = images.float()
        pixels = images.detach().flatten(1)
        least, most = pixels.amin(1), pixels.amax(1)  # aminmax is ten times slower on a CPU (torch 2.15)
        valid = (least >= low) & (most <= high)  # comparisons with NaN are False
        cleaned = clamp(images, 0, 1)
        if differentiated(images) or not _is_readable(valid):
            return torch.where(valid[:, None, None, None], cleaned, 0.5), valid
        for row, is_valid in zip(cleaned.unbind(), valid.tolist()):  # `where` takes three times as long
            if not is_valid:
                row.fill_(0.5)
        return cleaned, valid


def _is_readable(tensor: Tensor) -> bool:
    """Whether reading values costs nothing: a CPU's own tensor, that no transform or tracer stands behind."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def _ssim_map(means: Tensor, powers: Tensor, c1: float, c2: float, with_luminance: bool) -> Tensor:
    result = torch.empty_like(means[0])
    if not _launched(result, lambda triton: triton.ssim_map(means, powers, c1, c2, with_luminance, result)):
        raise RuntimeError(f"Triton failed at SSIM though it had filtered before: {_unusable[0]}")
    return result


def _batched_ssim_map(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    # one batch for both: they come from the same pair
    pairs = [maps.movedim(dim, 1).contiguous() for maps, dim in zip(inputs[:2], in_dims)]
    return torch.ops.iqareward.ssim_map(*pairs, *inputs[2:]), 0


def _launched(result: Tensor, launch: Callable[[Any], None]) -> bool:
    """Whether the kernels of a non-empty result could be launched on its device."""
    if result.numel() == 0:
        return True
    if _unusable:
        return False
    try:
        from iqareward.functional import _triton

        with torch.cuda.device(result.device) if result.is_cuda else nullcontext():
            launch(_triton)
    except ImportError as error:
        _unusable.append(str(error))
        return False
    except _DEVICE_ERRORS:
        raise  # says nothing about Triton: work queued before may have failed
    except Exception as error:  # a compiler raises anything
        _unusable.append(str(error))
        message = (
            f"Triton failed on {result.device}, so this process filters and checks images by slower torch operations"
        )
        warnings.warn(f"{message}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


for _device in ("CUDA", "CPU"):
    _library.impl("correlate", _correlate, _device)
    _library.impl("clean", _clean, _device)
    _library.impl("ssim_map", _ssim_map, _device)
torch.library.register_fake("iqareward::ssim_map", lambda means, *_: torch.empty_like(means[0]), lib=_library)
torch.library.register_vmap("iqareward::ssim_map", _batched_ssim_map, lib=_library)
torch.library.register_fake("iqareward::correlate", _empty_correlate, lib=_library)
torch.library.register_fake("iqareward::clean", _empty_clean, lib=_library)
