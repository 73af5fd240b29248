"""The classical metrics as pure functions on `[B, 3, H, W]`, in the direction of their papers."""

from iqareward.functional.brisque import brisque as brisque
from iqareward.functional.gmsd import gmsd as gmsd
from iqareward.functional.haarpsi import haarpsi as haarpsi
from iqareward.functional.ms_ssim import ms_ssim as ms_ssim
from iqareward.functional.niqe import NaturalModel as NaturalModel
from iqareward.functional.niqe import fit_natural_model as fit_natural_model
from iqareward.functional.niqe import niqe as niqe
from iqareward.functional.piqe import piqe as piqe
from iqareward.functional.psnr import psnr as psnr
from iqareward.functional.ssim import ssim as ssim
