"""The kernels for a GPU: run by Triton's interpreter on a CPU, compiled for a GPU that is absent, run on a real one."""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import iqareward
from benchmarks.meter import Meter
from iqareward.functional import ssim
from iqareward.functional.color import luma
from iqareward.functional.filters import blur_valid, gaussian_taps, halve
from iqareward.functional.statistics import STATISTICS
from iqareward.rewards.core import RANGE_SLACK, sanitize
from tests.gpu import fake_gpu, no_waits
from tests.tolerances import EXACT, FORMULA_FP32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.float32, torch.float64]


def kernels(test):
    """Mark what runs under the interpreter, which `test_under_the_interpreter` starts, and on a GPU."""
    missing = not INTERPRETED and not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="runs under TRITON_INTERPRET=1, or on a GPU")(test))


def run(*arguments, **environment):
    """Run Python with arguments and environment variables from the root of the checkout; it has to succeed."""
    environment, root = {**os.environ, **environment}, Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def plainly(monkeypatch):
    """A context in which torch's own operations do the work, as while compiling."""

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            yield

    return context


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter takes as long for a tile of any size; tests without this have the size of a GPU."""
    if INTERPRETED:
        from iqareward.functional import _triton

        monkeypatch.setattr(_triton, "SIDE", 128)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_convolution(maps, taps):
    """The filter as a dense convolution in float64, on a CPU."""
    window = torch.tensor(taps, dtype=torch.float64)
    planes = maps.detach().cpu().double().reshape(-1, 1, *maps.shape[-2:])
    result = F.conv2d(planes, (window[:, None] * window)[None, None])
    return result.reshape(*maps.shape[:-2], *result.shape[-2:])


@kernels
@settings(max_examples=10 if INTERPRETED else 50)
@given(
    lead=st.lists(st.integers(1, 2), max_size=2),
    size=st.tuples(st.integers(15, 75), st.integers(15, 75)),
    taps=st.sampled_from([[0.75], [0.1, -0.4, 0.7, 0.2], [(-0.9) ** k for k in range(15)]]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    dtype=st.sampled_from(TYPES),
)
def test_any_shape_and_layout(lead, size, taps, layout, dtype):
    """Sizes beside those of the tiles, strides and offsets: a dense convolution. Each list of taps is compiled anew."""
    maps = noise(*lead, *size, dtype=dtype).to(DEVICE)
    if layout == "transposed":
        maps = maps.mT
    elif layout == "sliced" and size[0] > 15:
        maps = F.pad(maps, (2, 0))[..., 1:, 2:]
    found = blur_valid(maps, taps).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), by_convolution(maps, taps), **FORMULA_FP32)


@kernels
def test_precision_of_float64():
    """Taps are not rounded to float32 for planes in float64."""
    maps, taps = noise(1, 40, 40, dtype=torch.float64), gaussian_taps(11, 1.5)
    expected = by_convolution(maps, taps)
    torch.testing.assert_close(blur_valid(maps.to(DEVICE), taps).cpu(), expected, rtol=1e-14, atol=1e-14)


@kernels
def test_broken_pixels_stay_where_they_are():
    """A NaN or an infinity reaches the windows that hold it and no other."""
    maps = noise(1, 40, 40)
    maps[0, 20, 7], maps[0, 3, 3] = torch.nan, torch.inf
    found = blur_valid(maps.to(DEVICE), gaussian_taps(11, 1.5)).cpu()
    held = F.max_pool2d((~maps.isfinite()).float(), 11, stride=1).bool()
    assert torch.equal(~found.isfinite(), held)


@kernels
@pytest.mark.parametrize("shape", [(2, 0, 16, 16), (0, 3, 16, 16), (1, 1, 11, 11)])
def test_empty_and_smallest(shape):
    """No planes give no planes; a plane of the window's size one number."""
    found = blur_valid(noise(*shape).to(DEVICE), gaussian_taps(11, 1.5))
    assert found.shape == (*shape[:2], shape[2] - 10, shape[3] - 10)


@kernels
def test_a_plane_does_not_depend_on_its_batch():
    """Every plane alone gets the digits that it gets among others."""
    maps, taps = noise(3, 40, 40).to(DEVICE), gaussian_taps(11, 1.5)
    alone = torch.stack([blur_valid(plane, taps) for plane in maps])
    torch.testing.assert_close(blur_valid(maps, taps), alone, **EXACT)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_elements_than_32_bits_count():
    """The last of 2^19 + 1 planes of 64x64 is where it belongs."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    maps = noise(1, 64, 64).to("cuda")
    found = blur_valid(maps.expand(2**19 + 1, -1, -1), [0.5])
    torch.testing.assert_close(found[-1], maps[0] * 0.25, **EXACT)


@kernels
def test_derivatives_of_every_kind():
    """Numerical derivatives agree, first and second, backward and forward, alone and batched."""
    maps, taps = noise(1, 6, 7, dtype=torch.float64).to(DEVICE).requires_grad_(), [0.1, -0.4, 0.7]

    def function(values):
        return blur_valid(values, taps) ** 2

    options = {"check_batched_grad": True, "fast_mode": True}
    torch.autograd.gradcheck(function, maps, check_forward_ad=True, **options)
    torch.autograd.gradgradcheck(function, maps, **options)


@kernels
def test_function_transforms():
    """`vmap` over any dimension, and `grad` under it, are a loop."""
    maps, taps = noise(3, 8, 9).to(DEVICE), [0.25, 0.5, 0.125]

    def total(plane):
        return (blur_valid(plane, taps) ** 3).sum()

    func = torch.func
    loop = torch.stack([blur_valid(plane, taps) for plane in maps.unbind(2)])
    torch.testing.assert_close(func.vmap(lambda plane: blur_valid(plane, taps), in_dims=2)(maps), loop, **EXACT)
    slopes = torch.stack([func.grad(total)(plane) for plane in maps])
    torch.testing.assert_close(func.vmap(func.grad(total))(maps), slopes, **FORMULA_FP32)


@kernels
def test_edge_density():
    """Taps that differ by direction and are not symmetric keep their order."""
    images = noise(2, 3, 20, 24)
    planes = luma(images).double()[:, None]
    sobel = torch.tensor([[[[-0.125, 0, 0.125], [-0.25, 0, 0.25], [-0.125, 0, 0.125]]]], dtype=torch.float64)
    expected = torch.hypot(F.conv2d(planes, sobel), F.conv2d(planes, sobel.mT)).mean((1, 2, 3)).float()
    torch.testing.assert_close(STATISTICS["edge_density"](images.to(DEVICE)).cpu(), expected, **FORMULA_FP32)


@kernels
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 9), (7, 9)])
@pytest.mark.parametrize("replicate", [True, False])
def test_halve(size, replicate, plainly):
    """One pooling kernel gives the means, at odd borders too, and their gradients."""
    maps = noise(2, 3, *size, dtype=torch.float64).requires_grad_()
    weights = noise(2, 3, 4, 5, dtype=torch.float64)

    def means_and_slopes(maps):
        means = halve(maps, replicate=replicate)
        total = (means * weights[..., : means.shape[-2], : means.shape[-1]].to(maps.device)).sum()
        return means.cpu(), torch.autograd.grad(total, maps)[0].cpu()

    with plainly():
        expected = means_and_slopes(maps)
    torch.testing.assert_close(means_and_slopes(maps.detach().to(DEVICE).requires_grad_()), expected)


@kernels
@pytest.mark.parametrize("dtype", [*TYPES, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sanitize(dtype, layout):
    """Pixels are clamped; an image with one bad pixel anywhere is grey and marked, and its neighbours are not."""
    images = (noise(9, 3, 37, 29) * 1.4 - 0.2).to(dtype)
    bad = [torch.nan, torch.inf, -torch.inf, 1.5, -0.5]
    for row, value in enumerate(bad, start=1):
        images.view(9, -1)[row, row * 800 - 1 if row < 4 else -1] = value
    images[6, 0, 0, 0], images[7, 2, -1, -1] = 1 + RANGE_SLACK, -RANGE_SLACK
    expected_valid = torch.tensor([row not in range(1, 6) for row in range(9)])
    expected = torch.where(expected_valid[:, None, None, None], images.float().clamp(0, 1), 0.5)
    there = images.to(DEVICE)
    if layout == "channels_last":
        there = there.contiguous(memory_format=torch.channels_last)
    clean, valid = sanitize(there)
    assert clean.dtype == torch.float32
    assert torch.equal(valid.cpu(), expected_valid)
    torch.testing.assert_close(clean.cpu(), expected, **EXACT)


@kernels
def test_gradient_of_sanitize():
    """It reaches the pixels of valid images in [0, 1], bounds included, also a second time."""
    images = (noise(4, 3, 9, 9) * 1.2 - 0.1).to(DEVICE)
    images[0, 0, 0], images[0, 1, 0], images[1, 0, 0, 0], images[1, 1] = 0.0, 1.0, torch.nan, 0.5
    images.requires_grad_()
    (slope,) = torch.autograd.grad(sanitize(images)[0].square().sum(), images, create_graph=True)
    inside = (images >= 0) & (images <= 1)
    inside[1] = False
    torch.testing.assert_close(slope, torch.where(inside, 2 * images, 0), **EXACT)
    (second,) = torch.autograd.grad(slope.nan_to_num().sum(), images)
    torch.testing.assert_close(second, 2.0 * inside, **EXACT)


@kernels
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", TYPES)
def test_ssim_is_the_same_without_a_graph(dtype):
    """One kernel without a graph, and torch's operations with one, give the same digits; `vmap` too."""
    references = noise(2, 3, 20, 45, dtype=dtype)
    images = (references + 0.1 * noise(2, 3, 20, 45, dtype=dtype, seed=1)).clamp(0, 1)
    images[0, :, :, :15] = references[0, :, :, :15] = 0.5  # variances that are rounding noise
    images, references = images.to(DEVICE), references.to(DEVICE)
    expected = ssim(images, references)
    with torch.no_grad():
        torch.testing.assert_close(ssim(images, references), expected, **EXACT)
        batched = torch.func.vmap(lambda *pair: ssim(*pair), in_dims=(0, None))(images[:, None], references[:1])
        torch.testing.assert_close(batched[:, 0], ssim(images, references[:1].expand_as(images)), **EXACT)


@kernels
@pytest.mark.parametrize("name", ["ssim", "ms_ssim", "gmsd", "haarpsi", "psnr", "piqe", "niqe", "brisque"])
@pytest.mark.usefixtures("large_tiles")
def test_rewards(name, plainly):
    """Scores and gradients are those of torch's own operations, without a wait; bad images alone have no score."""
    side = 168 if name == "ms_ssim" else 96 if name in ("niqe", "brisque") else 40
    references = noise(3, 3, side // 8, side // 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (references + 0.2 * noise(3, 3, side, side, seed=1)).clamp(max=1)
    images[1, 0, 5, 5], references[2, 1, 0, 0] = torch.nan, 2.0
    reward = iqareward.load(name)

    def scores_and_slopes(device):
        there = images.to(device).requires_grad_(reward.differentiable), references.to(device)
        if device == "cuda":
            reward(*there)  # compiles
        with no_waits() if device == "cuda" else nullcontext():
            scores = reward(*there)
        slopes = torch.autograd.grad(scores[:1].sum(), there[0])[0] if reward.differentiable else scores
        return scores.detach().cpu(), slopes.cpu()

    with plainly():
        expected = scores_and_slopes("cpu")
    found = scores_and_slopes(DEVICE)
    assert found[0].isnan().tolist() == [False, True, reward.needs_references]
    torch.testing.assert_close(found, expected, equal_nan=True, **FORMULA_FP32)


@fake_gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes no fake tensors")
@pytest.mark.parametrize(
    ("name", "launches", "trips"),
    [("psnr", 16, 25), ("ssim", 27, 70), ("ms_ssim", 82, 84), ("gmsd", 45, 58), ("haarpsi", 90, 140)],
)
def test_few_launches_and_little_traffic(name, launches, trips):
    """A warm call of a reward; traffic in trips of one plane, of which reading and cleaning a pair is twelve."""
    reward, side = iqareward.load(name), 256
    with Meter() as meter:
        images, references = (torch.rand(4, 3, side, side, device="cuda") for _ in range(2))
        meter.second(lambda: reward(images, references=references))
    assert meter.kernels <= launches
    assert meter.bytes <= trips * 4 * side * side * 4
    assert not meter.waits


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts itself")
def test_under_the_interpreter():
    """All of the above with the kernels on a CPU, but for MS-SSIM, which takes a minute there."""
    pytest.importorskip("triton")
    run("-m", "pytest", "-q", "-m", "gpu", "-k", "not ms_ssim", "tests/functional/test_fused.py", TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_compiles_for_a_gpu(dtype, tmp_path, monkeypatch):
    """For compute capability 9.0: what the interpreter lets pass is compiled, and no register is spilled."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iqareward.functional import _triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    taps, cleaned = tuple(gaussian_taps(11, 1.5)), {"PIXELS": kernels.PIXELS}
    sources = [(kernels.clean_block, cleaned | {"LOW": -0.25, "HIGH": 1.25}), (kernels.grey_unless_valid, cleaned)]
    if dtype != "bf16":
        maps = cleaned | {"C1": 1e-4, "C2": 9e-4}
        sources += [(kernels.ssim_block, maps | {"WITH_LUMINANCE": way}) for way in (False, True)]
        filters = {"column_stride": 1, "TAPS": taps, "SIDE": kernels.SIDE}
        sources += [(kernels.correlate_tile, filters | {"IS_VERTICAL": way}) for way in (False, True)]
    pointers = {
        "source": dtype,
        "first": dtype,
        "second": dtype,
        "means": dtype,
        "powers": dtype,
        "flags": "i8",
        "valid": "i8",
    }
    pointers["target"] = "fp32" if dtype == "bf16" else dtype
    for kernel, constants in sources:
        signature = {
            name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"enable_fp_fusion": True})
        (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True)
        assert "STACK:0 " in usage.stdout, usage.stdout


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.parametrize("state", ["missing", "broken"])
def test_without_triton(state):
    """Where Triton is not installed torch's own operations do the work; where it cannot compile they do, said once."""
    lines = [
        "import sys, types, warnings, torch, iqareward",
        "def broken(*arguments, **options): raise RuntimeError('no C compiler')",
        "module, language = types.ModuleType('triton'), types.ModuleType('triton.language')",
        "module.jit, module.language = broken, language",
        f"fake = [None, None] if {state!r} == 'missing' else [module, language]",
        "reward = iqareward.load('ssim')",
        "sys.modules.update(zip(('triton', 'triton.language'), fake))",
        "images = torch.rand(1, 3, 16, 16)",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        "    scores = [reward(images, references=images).item() for _ in range(2)]",
        "assert scores == [1.0, 1.0], scores",
        f"assert ['no C compiler' in str(warning.message) for warning in caught] == {[True] * (state == 'broken')}",
    ]
    run("-c", "\n".join(lines), TRITON_INTERPRET="1")
