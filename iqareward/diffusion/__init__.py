"""Reference loop: difficulty-adaptive reinforcement learning for restoration models in diffusers."""

from iqareward.diffusion.autoencoder import Autoencoder as Autoencoder
from iqareward.diffusion.controlnet import ControlNetPolicy as ControlNetPolicy
from iqareward.diffusion.ddim import DDIM as DDIM
from iqareward.diffusion.experience import Sampling as Sampling
from iqareward.diffusion.finite import TrainingError as TrainingError
from iqareward.diffusion.flow_cps import FlowCPS as FlowCPS
from iqareward.diffusion.flow_sde import FlowSDE as FlowSDE
from iqareward.diffusion.flow_transformer import FlowPolicy as FlowPolicy
from iqareward.diffusion.forward_process import ForwardProcess as ForwardProcess
from iqareward.diffusion.learner import Optimization as Optimization
from iqareward.diffusion.pixel import PixelPolicy as PixelPolicy
from iqareward.diffusion.policy import Policy as Policy
from iqareward.diffusion.policy import add_lora as add_lora
from iqareward.diffusion.policy_gradient import PolicyGradient as PolicyGradient
from iqareward.diffusion.reward_gradient import RewardGradient as RewardGradient
from iqareward.diffusion.rollout import rollout as rollout
from iqareward.diffusion.trainer import DifficultyAdaptiveTrainer as DifficultyAdaptiveTrainer
from iqareward.diffusion.validation import Validation as Validation
