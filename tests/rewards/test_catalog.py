"""Every reward with a name keeps the contract and tells the truth about itself; sums are parsed as written."""

import pickle
import re
from functools import partial
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iqareward import LPIPSReward, WeightedSum, check_reward, evaluate, functional, load
from iqareward.rewards.catalog import CATALOG, known_options, on_unit_scale, options_of, published, text_of
from iqareward.rewards.options import read_options, write_options
from iqareward.rewards.pyiqa import NEEDS_CUDA, REFUSED, pyiqa_configs
from tests.tolerances import EXACT, OTHER_PACKAGE

CLASSICAL = [name for name, entry in CATALOG.items() if entry.extra == "" and not entry.weights]


@pytest.mark.parametrize("name", CLASSICAL)
def test_every_reward_keeps_the_contract(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """Each reward without weights passes the public check on photographs, direction included."""
    photographs, degraded = photographs[:3], degraded_photographs[:3]
    near = (photographs + 0.02 * torch.randn(photographs.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    images, references = (near, photographs) if load(name).needs_references else (photographs, None)
    for differentiable in {False, CATALOG[name].differentiable}:
        reward = load(name, differentiable=differentiable)
        check_reward(reward, images, references, degraded=degraded)


@pytest.mark.parametrize("name", CLASSICAL)
def test_facts_of_the_table(name: str) -> None:
    """What the table says of a reward is what the reward says of itself."""
    reward = load(name)
    assert reward.name == name
    assert reward.needs_references == CATALOG[name].needs_references
    assert not reward.differentiable
    if CATALOG[name].differentiable:
        assert load(name, differentiable=True).differentiable
    else:
        with pytest.raises(ValueError, match=f"{name} has no useful gradient"):
            load(name, differentiable=True)


@pytest.mark.parametrize("name", CATALOG)
def test_range_and_direction_of_the_table(name: str) -> None:
    """The table knows the bounds of every reward; distances are negated, so that 0 is their best."""
    if CATALOG[name].extra:
        pytest.importorskip("piq")
        pytest.importorskip("transformers")
    entry = CATALOG[name]
    assert load(name).bounds == entry.bounds
    assert entry.higher_is_better == (entry.bounds[1] != 0) or name == "brisque"  # an opinion, lower is better


@pytest.mark.parametrize("name", CLASSICAL)
def test_published_numbers_of_classical_metrics(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """The published number is what the pure function gives, whatever sign the reward has."""
    scale, offset = published(name)
    function = partial(functional.psnr, color="y") if name == "psnr_y" else getattr(functional, name)
    references = {"references": photographs} if CATALOG[name].needs_references else {}
    printed = scale * load(name)(degraded_photographs, **references) + offset
    torch.testing.assert_close(printed, function(degraded_photographs, *references.values()), **EXACT)


@pytest.mark.parametrize("name", CATALOG)
def test_published_range_of_every_reward(name: str) -> None:
    """Distances are printed without the minus, judges on their scale "mos", others as they are here."""
    entry = CATALOG[name]
    if entry.published_range is None:  # on a curve
        assert (published(name), published(f"{name}(scale=raw)")) == (None, (1, 0))
        return
    scale, offset = published(name)
    if not entry.higher_is_better:
        assert (scale, offset) == (-1, 0)
    elif entry.published_range == (1.0, 5.0):
        assert load(f"{name}(scale=mos)").bounds == (offset, scale + offset)
        assert published(f"{name}(scale=mos)") == (1, 0)
    elif name == "hpsv2":  # a cosine in percent
        assert (scale, offset) == (100, 0)
    else:
        assert (scale, offset) == (1, 0)


def test_published_numbers_of_pyiqa_and_sums() -> None:
    """pyiqa's metrics are printed in their own direction; sums and ranges are our own."""
    assert published("pyiqa:musiq") == published("pyiqa:MUSIQ") == (1, 0)
    assert published("pyiqa:niqe") == published("NIQE") == (-1, 0)
    assert published("0.5*ssim + 0.5*haarpsi") is published("psnr[10, 50]") is None


@pytest.mark.parametrize("name", CLASSICAL)
def test_wrong_ranges_are_not_scored(name: str, photographs: Tensor) -> None:
    """Images in [-1, 1] or [0, 255] get NaN, not a plausible number."""
    batch = torch.stack([photographs[0], photographs[0] * 2 - 1, photographs[0] * 255])
    scores = load(name)(batch, references=photographs[:3])
    assert scores.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize("picture", ["black", "white", "gray", "ramp", "checker", "noise", "identical"])
def test_special_pictures(name: str, picture: str, photographs: Tensor) -> None:
    """Flat, extreme and identical images give a number or NaN, never inf, and never another image's score."""
    rows, columns = torch.meshgrid(torch.arange(192), torch.arange(192), indexing="ij")
    special = {
        "black": torch.zeros(3, 192, 192),
        "white": torch.ones(3, 192, 192),
        "gray": torch.full((3, 192, 192), 0.5),
        "ramp": (columns / 191).expand(3, -1, -1),
        "checker": ((rows + columns) % 2).float().expand(3, -1, -1),
        "noise": torch.rand(3, 192, 192, generator=torch.Generator().manual_seed(0)),
        "identical": photographs[0],
    }[picture]
    reward = load(name)
    for reference in (special, photographs[1]):
        references = torch.stack([photographs[1], reference])
        scores = reward(torch.stack([photographs[0], special]), references=references)
        assert not scores.isinf().any()
        torch.testing.assert_close(scores[:1], reward(photographs[:1], references=photographs[1:2]), **EXACT)
    if CATALOG[name].needs_references:
        torch.testing.assert_close(
            reward(special[None], references=special[None]), torch.tensor([reward.bounds[1]]), **OTHER_PACKAGE
        )


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("side", [1, 2, 5, 10, 11, 15, 16, 33, 64, 97, 161, 193])
@pytest.mark.parametrize("name", CLASSICAL)
def test_every_size(name: str, side: int) -> None:
    """Any size, also strips, gives a number or NaN, in a batch and in a mixed list."""
    rng = torch.Generator().manual_seed(side)
    images = [torch.rand(3, side, side + 7, generator=rng), torch.rand(3, 300, side, generator=rng)]
    scores = load(name)(images, references=[image.flip(-1) for image in images])
    assert scores.shape == (2,)
    assert not scores.isinf().any()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_a_long_strip() -> None:
    """4096 pixels on a side, one on the other: not scored or scored, but never an error."""
    for name in CLASSICAL:
        for shape in ((1, 4096), (4096, 16), (4096, 200)):
            image = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
            assert not load(name)(image, references=image).isinf().any()


def test_sums(photographs: Tensor) -> None:
    """A sum is read with weights, signs and scientific notation, and keeps its parts."""
    reward = load("0.7*piqe[-100, 0] - ssim + 1e-1 * psnr[1e1,50.5]")
    assert isinstance(reward, WeightedSum)
    names = [(0.7, "piqe[-100, 0]"), (-1.0, "ssim"), (0.1, "psnr[10, 50.5]")]
    assert [(weight, part.name) for weight, part in zip(reward.weights, reward.parts)] == names
    assert (reward.bounds[0], reward.bounds[1]) == pytest.approx((-1.0, 1.8))
    images = photographs[:2] * 0.9
    piqe, ssim, psnr = (load(name)(images, references=photographs[:2]) for name in ("piqe", "ssim", "psnr"))
    expected = 0.7 * (piqe + 100) / 100 - ssim + 0.1 * (psnr - 10) / 40.5
    torch.testing.assert_close(reward(images, references=photographs[:2]), expected, **OTHER_PACKAGE)
    assert isinstance(load("2*ssim"), WeightedSum)
    assert isinstance(load("0.01*piqe"), WeightedSum)  # alone it has no scale to share
    assert pickle.loads(pickle.dumps(reward)).name == reward.name
    differentiable = load("ssim + psnr[10, 50]", differentiable=True)
    assert differentiable(images.requires_grad_(), references=photographs[:2]).requires_grad


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("PSNR", "psnr"),
        (" PSNR-Y ", "psnr_y"),
        ("MS-SSIM", "ms_ssim"),
        ("ms_ssim", "ms_ssim"),
        ("MSSSIM", "ms_ssim"),
        ("Q-Align", "qalign"),
        ("HaarPSI", "haarpsi"),
        ("psnr[10, 50]", "psnr[10, 50]"),
        ("PSNR[10, 50]", "psnr[10, 50]"),
    ],
)
def test_names_as_papers_write_them(spec: str, name: str) -> None:
    """Case, hyphens and underscores of a name do not count."""
    assert load(spec).name == name


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        ("0.1234567*ssim + 0.5*haarpsi", "0.1234568*ssim + 0.5*haarpsi"),
        ("ssim + 0.3*psnr[10.00001, 50]", "ssim + 0.3*psnr[10.00002, 50]"),
        ("0.3000000000000001*ssim", "0.3*ssim"),
    ],
)
def test_rewards_that_differ_have_names_that_differ(spec: str, other: str) -> None:
    """No digit of a weight or a bound is lost: a cache tells rewards apart by their names."""
    assert load(spec).name != load(other).name
    assert load(load(spec).name).name == load(spec).name


def test_names_of_pyiqa() -> None:
    """Each of pyiqa's names is found as it stands and in capitals with other hyphens, none for another."""
    pytest.importorskip("pyiqa")
    for metric in pyiqa_configs():
        if metric not in NEEDS_CUDA | REFUSED.keys():
            assert load(f"pyiqa:{metric}").name == f"pyiqa:{metric}"
            assert load(f"pyiqa:{metric.upper().replace('_', '-')}").name == f"pyiqa:{metric}"


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("0.7*haarpsi+0.3*ssim", [(0.7, "haarpsi"), (0.3, "ssim")]),
        ("ssim-0.5*MS-SSIM", [(1.0, "ssim"), (-0.5, "ms_ssim")]),
        ("ms-ssim-ssim", [(1.0, "ms_ssim"), (-1.0, "ssim")]),
        ("1e-1*psnr[-10,50]+ssim -haarpsi", [(0.1, "psnr[-10, 50]"), (1.0, "ssim"), (-1.0, "haarpsi")]),
    ],
)
def test_sums_without_spaces(spec: str, parts: list[tuple[float, str]]) -> None:
    """Operators need no spaces, although names may hold hyphens."""
    reward = load(spec)
    assert isinstance(reward, WeightedSum)
    assert [(weight, part.name) for weight, part in zip(reward.weights, reward.parts)] == parts


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("pyiqa:clipiqa+ssim", ["pyiqa:clipiqa", "ssim"]),
        ("pyiqa:clipiqa++ssim", ["pyiqa:clipiqa+", "ssim"]),
        ("pyiqa:clipiqa+ + ssim", ["pyiqa:clipiqa+", "ssim"]),
        ("ssim+pyiqa:qualiclip+-clive", ["ssim", "pyiqa:qualiclip+-clive"]),
        ("pyiqa:qualiclip+-clive-ssim", ["pyiqa:qualiclip+-clive", "ssim"]),
    ],
)
def test_sums_with_names_that_hold_operators(spec: str, names: list[str]) -> None:
    """A plus or hyphen that belongs to a name of pyiqa is told from an operator."""
    pytest.importorskip("pyiqa")
    with pytest.raises(ValueError, match="adds scores of different scales"):  # clipiqa declares no bounds
        load(spec)
    ranged = spec.replace(names[0], f"{names[0]}[0,1]", 1).replace(names[1], f"{names[1]}[0,1]", 1)
    reward = load(ranged)
    assert isinstance(reward, WeightedSum)
    assert [part.name for part in reward.parts] == [f"{name}[0, 1]" for name in names]


@pytest.mark.parametrize("spec", ["pyiqa:musiq-koniq", "0.5*ssim + 0.5*pyiqa:musiq-koniq[0, 1]"])
def test_a_hyphen_of_an_unknown_name_is_no_minus(spec: str) -> None:
    """There is a `pyiqa:musiq`; nobody who writes `pyiqa:musiq-koniq` wants to subtract a koniq from it."""
    pytest.importorskip("pyiqa")
    with pytest.raises(ValueError, match=r"unknown reward 'pyiqa:musiq-koniq'; did you mean .*pyiqa:musiq"):
        load(spec)


def test_a_sum_that_can_be_read_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a name contains an operator between two other names, spaces are asked for, and then decide."""
    monkeypatch.setitem(CATALOG, "ssim-haarpsi", CATALOG["gmsd"])
    with pytest.raises(ValueError, match=r"read as '0.5\*ssim-haarpsi' or '0.5\*ssim - haarpsi'; put spaces"):
        load("0.5*ssim-haarpsi")
    assert [part.name for part in load("0.5*ssim - haarpsi").parts] == ["ssim", "haarpsi"]


@pytest.mark.parametrize(
    ("spec", "wide", "line"),
    [
        ("0.7*lpips + 0.3*ssim", "lpips may leave [-1, 1], and no calibration of it", "0.7*lpips[-1, 0] + 0.3*ssim"),
        ("LPIPS+0.3*DISTS+psnr", "lpips, dists may leave", "LPIPS[-1, 0] + 0.3*DISTS[-1, 0] + psnr"),
    ],
)
def test_sums_of_different_scales(spec: str, wide: str, line: str) -> None:
    """A part that may leave [-1, 1] and has no calibration is refused with the line to write, and that line loads."""
    pytest.importorskip("piq")
    with pytest.raises(ValueError, match=rf"{re.escape(wide)}.* ships\. Write {re.escape(repr(line))}"):
        load(spec)
    assert load(line).parts[0].bounds == (0.0, 1.0)


def test_a_distance_is_not_subtracted() -> None:
    """Scores of GMSD are negative already: subtracting them would pay for damage, so the message asks."""
    for spec in ("0.5*ssim - 0.5*gmsd", "0.5*lpips - 0.5*gmsd"):
        with pytest.raises(ValueError, match=r"gmsd: higher is better here already; did you mean \+ instead of -\?"):
            load(spec)


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if not entry.higher_is_better])
def test_no_distance_is_subtracted_in_any_form(name: str) -> None:
    """Neither alone nor in a sum, as text or mapping, whatever its bounds; the line of the message loads."""
    if CATALOG[name].extra:
        pytest.importorskip("piq")
    for spec in (f"-{name}", {name: -1}, [{"ssim": 1}, {"name": name, "weight": -0.5}]):
        with pytest.raises(ValueError, match=rf"{name}: higher is better here already") as error:
            load(spec)
        assert load(re.findall(r"[Ww]rite '([^']*)'", str(error.value))[-1]).bounds[0] < 0
    with pytest.raises(ValueError, match="higher is better here already"):
        on_unit_scale(name, load(name), weight=-1.0)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"ssim": 10**400}, TypeError, "mapping of names to weights"),
        ({"name": "ssim", "weight": 10**400}, TypeError, "a number as `weight` of 'ssim'"),
        ({"psnr": {"range": [0, 10**400]}}, ValueError, "`range` of 'psnr'"),
        ({"clipscore": {"scale": 10**400}}, ValueError, "a number as option 'scale'"),
        ({"name": "ssim", True: "y", "color": "y"}, ValueError, r"options of 'ssim' as text, got \[True\]"),
        ({"ssim": {5: 3}}, ValueError, r"options of 'ssim' as text, got \[5\]"),
    ],
)
def test_what_yaml_can_hold_but_no_reward_takes(spec: Any, error: type[Exception], message: str) -> None:
    """Integers that are no float, and keys that are not text, are refused by name."""
    with pytest.raises(error, match=message):
        load(spec)


@pytest.mark.parametrize("spec", [" + ".join(["ssim"] * 3000), f"lpips(net={'(' * 3000}{')' * 3000})"])
def test_what_is_nested_too_deeply(spec: str) -> None:
    """Thousands of parts or brackets are refused as a wrong text is."""
    with pytest.raises(ValueError, match="fewer parts and brackets"):
        load(spec)


@pytest.mark.parametrize("name", CATALOG)
def test_every_name_can_be_part_of_a_sum(name: str) -> None:
    """Each reward of the table is on the scale of sums, as it is, calibrated, or with the range of the message."""
    if CATALOG[name].extra:
        pytest.importorskip("piq")
        pytest.importorskip("transformers")
    if CATALOG[name].usual is None:
        with pytest.raises(ValueError, match=rf"Write '{name}\[low, high\] \+ 0.5\*"):
            load(f"{name} + 0.5*ssim")
        return
    low, high = CATALOG[name].usual
    assert load(f"{name}[{low:g}, {high:g}]").bounds == (0.0, 1.0)
    try:
        part = load(f"{name} + 0.5*{'haarpsi' if name == 'ssim' else 'ssim'}").parts[0]
    except ValueError as error:
        assert f"Write '{name}[{low:g}, {high:g}] + 0.5*" in str(error)
        best = load(name).bounds[1]
        # the factor of CLIPScore is far above what photographs reach
        assert best in (high, None) or name == "clipscore"
    else:
        assert part.name in (name, f"{name}[calibrated]")
        assert -1 <= part.bounds[0] < part.bounds[1] <= 1


def test_one_scale_moves_alike(photographs: Tensor) -> None:
    """Under noise both parts of a calibrated sum move by the same order; before, NIQE drowned SSIM."""
    noise = 0.1 * torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    noisy = (photographs + noise).clamp(0, 1)
    reward = load("0.7*niqe + 0.3*ssim")
    before, after = (evaluate(reward.parts, images, photographs) for images in (photographs, noisy))
    fall = {name: (before[name] - after[name]).mean().item() for name in before}
    assert 0.2 < fall["niqe[calibrated]"] / fall["ssim"] < 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nique", "did you mean niqe, piqe, brisque, pyiqa:unique"),
        ("zzz", "unknown reward 'zzz'; `iqareward list`"),
        ("musiq", r"unknown reward 'musiq'; did you mean pyiqa:musiq\?"),
        ("TOPIQ-NR", r"did you mean pyiqa:topiq_nr\?"),
        ("pyiqa:musik", "did you mean pyiqa:musiq,"),
        ("pyiqa:fid", "compares two sets of images"),
        ("0.7*ssim+0.3*nique", "unknown reward 'nique'"),
        ("pyiqa:clipiqa+ + nique+ssim", "unknown reward 'nique'"),
        ("", "could not read ''"),
        ("ssim--gmsd", "could not read '-gmsd'"),
        ("ssim+", "could not read ''"),
        ("0.7 niqe", "could not read"),
        ("psnr[10 50]", "could not read"),
        ("lpips(vgg)", r"expected options such as 'lpips\(net=vgg, batch_size=4\)', got 'vgg'"),
        ("ssim(nett=vgg)", r"'ssim\(nett=vgg\)' has an option that ssim does not have: .*nett"),
        ("haarpsi(color=y)", "has an option that haarpsi does not have: .*color"),
        ("ssim(higher_is_better=false)", "does not have: higher_is_better. It has batch_size, color, differentiable"),
        ("psnr_y(color=luma)", "has an option that psnr_y does not have: color"),
        ("fsim(metric=vsi)", "has an option that fsim does not have: metric"),
        ("ssim(batch_size=x)", "ssim expected a whole number or none as option 'batch_size', got 'x'"),
        ("ssim(batch_size=0)", "ssim expected `batch_size` >= 1, got 0"),
        ("ssim(batch_size=true)", "expected a whole number or none as option 'batch_size', got True"),
        ("ssim(color=pink)", "ssim expected luma or luma8 or y or rgb as option 'color', got 'pink'"),
        ("ssim(differentiable=maybe)", "ssim expected true or false as option 'differentiable', got 'maybe'"),
        ("lpips(net=vgg19)", "lpips expected alex or vgg or squeeze as option 'net', got 'vgg19'"),
        ("lpips(device=gpu)", "lpips expected a device such as cuda:0 or none as option 'device', got 'gpu'"),
        ("qalign(dtype=float7)", "qalign expected a dtype such as bfloat16 or none as option 'dtype', got 'float7'"),
        ("qalign(compiled=graphs)", "qalign expected true or false or graph as option 'compiled', got 'graphs'"),
        ("lpips(model=net)", "lpips expected an object of type Module or none as option 'model', got 'net'"),
        ("lpips(net=)", "expected options such as"),
        ("lpips(net=alex, net=vgg)", "the option 'net' twice"),
        ("lpips(weights='a.pth)", "a bracket or a quote that is not closed"),
        ("lpips(weights=a).pth)", r"could not read 'lpips\(weights=a\).pth\)'"),
        ("ssim + psnr[50, 10]", "low < high"),
        ("ssim + ssim", "unique names"),
        ("0.5*ssim + 0.5*wrong", "unknown reward 'wrong'"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str) -> None:
    """A name that does not exist lists near ones; a sum that cannot be read says how to write it."""
    with pytest.raises(ValueError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("lpips(net=vgg)", "lpips_vgg"),
        ("LPIPS( net = squeeze , batch_size=4 )", "lpips_squeeze"),
        ("fsim(batch_size=1)[0, 1]", "fsim[0, 1]"),
    ],
)
def test_options_of_a_reward(spec: str, name: str) -> None:
    """Options in parentheses reach the reward's constructor."""
    pytest.importorskip("piq")
    reward = load(spec)
    assert reward.name == name
    assert getattr(reward, "batch_size", None) == (4 if "4" in spec else None)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | st.text() | st.text(alphabet=" '\"\\\\,=()[]/.:a1-"),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,8}", fullmatch=True)


@given(options=st.dictionaries(KEYS, VALUES, max_size=4), spaces=st.sampled_from(["", " "]))
def test_options_survive_as_text(options: dict[str, Any], spaces: str) -> None:
    """Whatever the values of options are, their text gives them back, type for type."""
    text = write_options(options)
    assert repr(read_options(spaces + text[1:-1] + spaces)) == repr(options)


@given(
    file=st.text(alphabet=" '\"\\\\,=()[]/.:*+-ab1", min_size=1),
    net=st.sampled_from(["alex", "vgg"]),
    batch_size=st.none() | st.integers(1, 64),
    limits=st.none() | st.tuples(st.integers(-9, -1), st.floats(0, 9)),
    weight=st.none() | st.floats(-9, 9).filter(bool),
)
def test_text_and_mapping_build_the_same(
    file: str, net: str, batch_size: int | None, limits: tuple[int, float] | None, weight: float | None
) -> None:
    """Keywords, text, a mapping with the name, an item and a list give the same reward."""
    if limits is None and weight is not None:
        weight = abs(weight)  # without a range a distance is not subtracted
    options = {"weights": file, "net": net, "batch_size": batch_size}
    more = {} if limits is None else {"range": list(limits)}
    more |= {} if weight is None else {"weight": weight}
    forms = [
        text_of({"name": "lpips", **options, **more}),
        {"name": "lpips", **options, **more},
        {"lpips": {**options, **more}},
        [{"name": "LPIPS", **options, **more}],
        {"name": f"lpips{write_options(options)}", **more},
    ]
    made = [load(form) for form in forms]
    if not more:
        made.append(load("lpips", **options))
    assert {reward.name for reward in made} == {made[0].name}
    for reward in made:
        leaf = reward
        while not isinstance(leaf, LPIPSReward):
            leaf = leaf.parts[0] if leaf.parts else leaf.reward
        assert (leaf.batch_size, reward.bounds) == (batch_size, made[0].bounds)
    assert load(made[0].name).name == made[0].name


def test_keyword_options_belong_to_one_reward() -> None:
    """Options of `load` are those of the reward that is named, and a sum says where to write them."""
    assert load("ssim", color="y").name == "ssim(color=y)"
    assert load("ssim", batch_size=3).batch_size == 3
    assert load("0.5*ssim", color="y").name == "0.5*ssim(color=y)"
    with pytest.raises(ValueError, match=r"color for a sum of 2 .*'ssim \+ psnr_y\(color=y\)'"):
        load("0.5*ssim + psnr_y[10, 50]", color="y")
    with pytest.raises(ValueError, match="load got color of 'ssim\\(color=y\\)' twice"):
        load("ssim(color=y)", color="rgb")
    with pytest.raises(ValueError, match="does not have: nett"):
        load("ssim", nett=3)


def test_files_of_every_kind() -> None:
    """Paths reach the reward as they were written: with spaces, commas, brackets and backslashes, quoted or not."""
    files = ["/a b/c, (d).pth", r"C:\new\table.pth", "it's [1]=x.pth", "C:/a (1)/b.pth", "a+b-c*d.pth", "#1.pth", "1e5"]
    for file in files:
        name = load("lpips", weights=file).name
        assert (
            load(f"lpips{write_options({'weights': file})}").name
            == load({"name": "lpips", "weights": file}).name
            == name
        )
        assert load(f"0.5*ssim + 0.5*lpips{write_options({'weights': file})}[-1, 0]").parts[1].name == f"{name}[-1, 0]"
    for text in (r"C:\new\table.pth", "/a (1)/b.pth", "/o'brien/x[2].pth"):
        assert load(f"lpips(weights={text}, net=vgg)").name == load("lpips", weights=text, net="vgg").name


def test_options_are_values_of_python() -> None:
    """Words become dtypes where the option is one, and lists tuples."""
    for word in ("bfloat16", "bf16", "torch.bfloat16", torch.bfloat16):
        assert load("qalign", dtype=word).name == load("qalign(dtype=bfloat16)").name
    both = load("qalign(task=[quality, aesthetics])")
    assert both.tasks == load({"name": "qalign", "task": ["quality", "aesthetics"]}).tasks == ("quality", "aesthetics")


@pytest.mark.parametrize("name", CATALOG)
def test_options_of_every_reward_can_be_shown(name: str) -> None:
    """Every option has a kind, and its default is what the text form takes."""
    for option, values, _ in options_of(name):
        assert values
        if "=" in option:
            assert load(f"{name}({option})").name == load(name).name


# Where and how a reward computes, not what; and objects, which have no text.
UNNAMED = {"device", "batch_size", "differentiable", "compiled", "model"}
OPTIONS = {
    **dict.fromkeys(("weights", "heads", "base"), ("me/one", "me/two")),
    "dtype": (torch.float16, torch.bfloat16),
}


@pytest.mark.parametrize("name", CATALOG)
def test_options_that_change_scores_are_in_the_name(name: str) -> None:
    """Two values of an option, such as two files of weights, never have one name."""
    known = {option: parameter.annotation for option, parameter in known_options(name)[0].items()}
    for option in known.keys() - UNNAMED:
        literals = [get_args(kind) for kind in (known[option], *get_args(known[option])) if get_origin(kind) is Literal]
        values = literals[0] if literals else OPTIONS.get(option, ())
        names = [load(name, **{option: value}).name for value in values if value != "aesthetic"]  # "aesthetics" too
        assert len({*names}) == len(names), option


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "ssim + haarpsi"}, "the name of one reward"),
        ({"name": "ssim", "range": [1]}, r"expected one `range` of two numbers"),
        ({"name": "ssim", "range": "0, 1"}, r"`range` of 'ssim' as \[low, high\]"),
        ({"name": "psnr[10, 50]", "range": [0, 1]}, "expected one `range`"),
        ({"ssim": {"colour": "y"}}, "does not have: colour. It has batch_size, color"),
        ([{"name": "ssim"}, {"name": "ssim"}], "unique names"),
    ],
)
def test_mappings_that_cannot_be_loaded(spec: Any, message: str) -> None:
    """A mapping that says too little or too much is refused with what was expected."""
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_options_of_a_formula(photographs: Tensor) -> None:
    """The colour that a formula compares can be named, and is part of the reward's name."""
    reward = load("ssim(color=y)")
    assert reward.name == load(reward.name).name == "ssim(color=y)"
    pair = photographs[:2, :, :64, :64], photographs[2:, :, :64, :64]
    torch.testing.assert_close(reward(pair[0], references=pair[1]), functional.ssim(*pair, color="y"), **EXACT)
    assert load("ssim(differentiable=true)").differentiable
    assert not load("ssim(differentiable=false)", differentiable=True).differentiable


def test_mapping_of_names_to_weights() -> None:
    """A mapping, as a configuration in YAML gives it, is the sum of its items."""
    reward = load({"haarpsi": 0.7, "psnr(color=y)[10, 50]": 0.3, "ssim": -1})
    assert reward.name == load("0.7*haarpsi + 0.3*psnr(color=y)[10, 50] - ssim").name
    assert load({"ssim": -0.5}).name == load("-0.5*ssim").name == "-0.5*ssim"
    assert load({"psnr": 0.7, "ssim": 0.3}).name == "0.7*psnr[calibrated] + 0.3*ssim"
    with pytest.raises(ValueError, match="the name of one reward for each weight, got 'ssim \\+ haarpsi'"):
        load({"ssim + haarpsi": 0.5})


@pytest.mark.parametrize("spec", [3, None, [], {}, [0.5], load("ssim"), {"ssim": "0.5"}, {"ssim": True}])
def test_what_is_no_spec(spec: object) -> None:
    """Anything but text and a mapping of weights is a TypeError that says what was expected."""
    with pytest.raises(TypeError, match=r"load expected .*mapping of names to weights, got "):
        load(spec)  # pyright: ignore[reportArgumentType]
