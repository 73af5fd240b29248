"""Noise processes and their samplers: each denoising step as a Gaussian with a mean and a standard deviation."""

from iqareward.diffusion.processes.anchored import IRSDE, ResShift
from iqareward.diffusion.processes.betas import DDIM
from iqareward.diffusion.processes.flow import FlowCPS, FlowSDE
from iqareward.diffusion.processes.gaussian import NoiseProcess, Step, Transition

__all__ = ["DDIM", "IRSDE", "FlowCPS", "FlowSDE", "NoiseProcess", "ResShift", "Step", "Transition"]
