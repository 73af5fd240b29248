"""Weights that FSDP2 divides among processes: the share of one process, the whole, and passes in step."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Pass = TypeVar("Pass")


def is_sharded(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` has divided the weights of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, without a gradient and in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What `like`'s process has of a tensor that every process has the whole of, or that is sharded already."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return local(tensor)
    tensor = tensor.detach().to(like.device)
    return local(distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None))


def sharded_like(share: Tensor, like: Tensor) -> Tensor:
    """A tensor that is divided as `like` is, of which this process has `share`; `share` itself if `like` is whole."""
    if not isinstance(like, DTensor):
        return share
    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(value: Any, *, keep: bool = True) -> Any:
    """The value with every sharded tensor in it as a whole one on the CPU.

    All processes call it together. Those that do not `keep` the tensors get None in their place, so that not each of
    them needs memory for the whole model.
    """
    if isinstance(value, DTensor):
        with torch.no_grad():
            full = value.full_tensor()
        return full.cpu() if keep else None
    if type(value) is dict:
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(whole(item, keep=keep) for item in value)
    return value


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a pass has left; after it, `model.parameters()` are shares."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Generator[None]:
    """Within this context every process has all weights, so that processes may take different numbers of passes.

    Weights must not change, and passes must not be differentiated.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    after = [_reshards_after_forward(module) for module in modules]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module, value in zip(modules, after, strict=True):
            module.set_reshard_after_forward(value, recurse=False)
            module.reshard()


def _reshards_after_forward(module: FSDPModule) -> bool:
    # torch has a setter only
    state: Any = module._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # several since torch 2.10
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


def in_step(passes: Sequence[Sequence[Pass]], names: Sequence[str], accelerator: Any) -> list[list[tuple[Pass, bool]]]:
    """Passes through a sharded model, as many in every process, and whether each counts.

    Every pass gathers weights, so processes wait for each other in each. Those with fewer repeat their last one, which
    does not count.

    Raises:
        ValueError: One process has nothing to pass while others have; raised in all.
    """
    own = torch.tensor([len(kind) for kind in passes], device=accelerator.device)
    everyones: Any = accelerator.gather(own[None])
    most, fewest = everyones.amax(0).tolist(), everyones.amin(0).tolist()
    for name, high, low in zip(names, most, fewest, strict=True):
        if high and not low:
            raise ValueError(
                f"The trainer expected, with FSDP, inputs for {name} in every process, got a process without any. Use "
                "more inputs per update, give all inputs a ground truth or none, or train without FSDP."
            )
    return [
        [(each, True) for each in kind] + [(kind[-1], False)] * (high - len(kind)) if high else []
        for kind, high in zip(passes, most, strict=True)
    ]
