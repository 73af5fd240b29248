from iqareward.functional.gmsd import gmsd as gmsd
from iqareward.functional.haarpsi import haarpsi as haarpsi
from iqareward.functional.ms_ssim import ms_ssim as ms_ssim
from iqareward.functional.piqe import piqe as piqe
from iqareward.functional.psnr import psnr as psnr
from iqareward.functional.ssim import ssim as ssim
