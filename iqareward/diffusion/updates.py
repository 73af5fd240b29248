"""Steps of the optimiser over all processes: averaged gradients, finite or not taken at all."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from iqareward.diffusion.checkpoint import training_weights
from iqareward.diffusion.finite import OptimizerStep, agreed, require_usable_weights, step_if_finite
from iqareward.diffusion.policies.core import Policy
from iqareward.diffusion.sharding import is_sharded, local, sharded_like, share_of
from iqareward.seeds import sub_seed

MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], Any]

_BUCKET = 1 << 25  # elements of gradients that are averaged together
_REFUSED = ("DEEPSPEED", "MEGATRON_LM", "XLA")  # they own the optimiser, or passes and checkpoints


def adamw(learning_rate: float, weight_decay: float) -> MakeOptimizer:
    """Makes AdamW; a ValueError for weights of half precision, in which its small steps are rounded away."""

    def make(weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        coarse = sorted({str(weight.dtype) for weight in weights if torch.finfo(weight.dtype).bits < 32})
        if coarse:
            raise ValueError(
                f"The trainer expected the weights that train in float32, got {', '.join(coarse)}, in which steps of "
                f"size {learning_rate:g} are rounded away. Keep them in float32 with Accelerator(mixed_precision="
                "'bf16'), train LoRA adapters, or give an `optimizer` that rounds at random."
            )
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)

    return make


class Updates:
    """Moves the weights of a policy's model; gradients are averaged over the processes after the last backward pass.

    There is no wrapper of `DistributedDataParallel`: weights that a loss does not reach, such as adapters in the last
    block of a transformer, count as zero, and processes may take different numbers of backward passes. A model that
    FSDP2 shards, by accelerate's plugin or by `fully_shard` before, averages its gradients in each pass.

    Args:
        policy: Moved to the accelerator's device with all its parts; its model gets autocast.
        accelerator: Accelerate's `Accelerator`.
        make_optimizer: Makes the optimiser of the weights.
        make_schedule: Makes a learning-rate schedule of the optimiser; constant if not given.
        max_grad_norm: Longer gradients are shortened to this.

    Raises:
        ValueError: No weight of the model trains, or the accelerator divides the model in a way that cannot be saved.
    """

    def __init__(
        self,
        policy: Policy,
        accelerator: Any,
        make_optimizer: MakeOptimizer,
        make_schedule: MakeSchedule | None = None,
        *,
        max_grad_norm: float,
    ) -> None:
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if kind in _REFUSED:
            raise ValueError(
                f"The trainer expected processes with whole copies of the model, or FSDP2, got {kind}, whose "
                "checkpoints it cannot write. Use `accelerate launch --multi_gpu`, or `--use_fsdp --fsdp_version 2`."
            )
        by_plugin = kind == "FSDP"
        if by_plugin:
            _check_plugin(accelerator)
        policy.to(accelerator.device)
        self.weights = _trained(policy.model)
        if not self.weights:
            raise ValueError(
                f"The trainer expected {type(policy).__name__}.model with weights that require a gradient, got none. "
                "Add adapters with add_lora, or call model.requires_grad_(True)."
            )
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self._share_first_weights(policy.model)
        optimizer = make_optimizer(self.weights)
        if by_plugin:
            policy.model, self.optimizer = accelerator.prepare(policy.model, optimizer)
            self.weights = _trained(policy.model)
            self.schedule = None if make_schedule is None else make_schedule(optimizer)
        else:
            policy.model = accelerator.prepare_model(policy.model, evaluation_mode=True)
            # before accelerate's scaler replaces the optimiser's step, which the schedule looks at
            self.schedule = None if make_schedule is None else make_schedule(optimizer)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.sharded = is_sharded(policy.model)
        if self.sharded and accelerator.scaler is not None:
            raise ValueError("The trainer expected bf16 or float32 with FSDP, got fp16. Use mixed_precision='bf16'.")

    def _share_first_weights(self, model: nn.Module) -> None:
        """Give every process the weights of the first; a sharded model has one set of them already."""
        if self.accelerator.num_processes > 1:
            for tensor in (*self.weights, *model.buffers()):
                if not isinstance(tensor, DTensor):
                    torch.distributed.broadcast(tensor.detach(), 0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the loss."""
        if loss.requires_grad:
            # not `accelerator.backward`, which divides by its steps of gradient accumulation
            scaler = self.accelerator.scaler
            (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self, figures: Tensor, *, update: int) -> tuple[list[float], float, OptimizerStep]:
        """Move the weights if the gradient is finite, in all processes alike, and clear the gradient.

        Args:
            figures: Numbers of this process; they share the only wait for the device with the norm.
            update: For the message of an error.

        Returns:
            The figures summed over the processes, the norm of the gradient before clipping, and what the step did.

        Raises:
            TrainingError: The step made weights that are not finite.
        """
        self._average_gradients()
        # not `accelerator.clip_grad_norm_`, which unscales for every optimiser that the accelerator has made
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm = torch.as_tensor(norm, device=figures.device).float().view(1)
        summed: Any = self.accelerator.reduce(torch.cat([figures.float(), norm]), "sum")
        *totals, norm = summed.tolist()
        norm /= self.accelerator.num_processes
        rate = self.optimizer.param_groups[0]["lr"]
        step = step_if_finite(self.accelerator, self.optimizer, norm)
        if step.moved:
            if self.schedule is not None:
                self.schedule.step()
            shares = [local(weight) for weight in self.weights]
            with agreed(self.accelerator) if self.sharded else nullcontext():
                require_usable_weights(shares, update=update, norm=norm, learning_rate=rate)
        return totals, norm, step

    def _average_gradients(self) -> None:
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if self.accelerator.num_processes == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for weight in self.weights:
            if isinstance(weight, DTensor):
                continue  # averaged in the backward passes
            by_dtype.setdefault(weight.dtype, []).append(weight.grad)  # pyright: ignore[reportArgumentType]
        for gradients in by_dtype.values():
            for bucket in _buckets(gradients):
                flat: Any = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
                for gradient, mean in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                    gradient.copy_(mean.view_as(gradient))

    def _sharded(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimiser with its whole tensors divided as the weights are."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]

        def share(value: Any, weight: Tensor) -> Any:
            matches = isinstance(value, Tensor) and value.shape == weight.shape
            return sharded_like(share_of(value, weight), weight) if matches else value

        own = {
            place: {name: share(value, weights[place]) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return state | {"state": own}

    def _check_state(self) -> None:
        """Raise a ValueError if the optimiser keeps something of a sharded weight that is not sharded with it."""
        for weight, values in self.optimizer.state.items():
            for name, value in values.items():
                alone = isinstance(value, Tensor) and value.numel() > 1 and not isinstance(value, DTensor)
                if alone and isinstance(weight, DTensor):
                    raise ValueError(
                        f"The trainer expected, with FSDP, an optimiser whose state is sharded as its weights are, got "
                        f"a plain tensor {list(value.shape)} as {name!r}. Use torch's AdamW, or train without FSDP."
                    )

    def state_dict(self) -> dict[str, Any]:
        """The state of optimiser, schedule and scaler."""
        self._check_state()
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken."""
        self.optimizer.load_state_dict(self._sharded(state["optimizer"]) if self.sharded else state["optimizer"])
        for name, own in (("schedule", self.schedule), ("scaler", self.accelerator.scaler)):
            if own is not None and state[name] is not None:
                own.load_state_dict(state[name])


def _trained(model: nn.Module) -> list[Tensor]:
    return list(training_weights(model).values())


def _check_plugin(accelerator: Any) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"The trainer expected FSDP of version 2, got {plugin.fsdp_version}, whose flattened weights cannot be "
            "exchanged. Use `--fsdp_version 2`, or FullyShardedDataParallelPlugin(fsdp_version=2)."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("The trainer expected FSDP without cpu_offload, got it. Train LoRA adapters to save memory.")


def _buckets(gradients: Sequence[Tensor]) -> Generator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(each.numel() for each in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def supervising(policy: Policy, *path: int) -> Generator[None]:
    """Within this context dropout of the model is on, with random numbers of a seed, and batch norms keep theirs."""
    model, training = policy.model, policy.model.training
    devices = {weight.device.index for weight in model.parameters() if weight.is_cuda}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            module.eval()
    with torch.random.fork_rng(devices=list(devices)):
        for own in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            own.manual_seed(sub_seed(*path))
        try:
            yield
        finally:
            model.train(training)
