"""An algorithm that holds all that a checkpoint must keep: weights, optimizers, residuals and noise of each rank's own."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_accel import Algorithm, BoundAlgorithm, register_algorithm


class _Drifting(BoundAlgorithm):
    ranks_differ = True

    def __init__(self, context):
        super().__init__(context)
        self.residuals = [torch.zeros_like(parameter) for parameter in context.parameters.tensors]
        self.steps = 0

    def before_step(self):
        self.steps += 1
        for parameter, residual in zip(self.context.parameters.tensors, self.residuals, strict=True):
            residual.mul_(0.5).add_(torch.randn_like(residual), alpha=0.1)
            parameter.grad += residual

    def consensus(self):
        with torch.no_grad():
            for parameter in self.context.parameters.tensors:
                dist.all_reduce(parameter, group=self.context.ddp.process_group)
                parameter /= self.communicator.world_size

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def rank_state_dict(self):
        return {"residuals": self.residuals}

    def load_rank_state_dict(self, state):
        for residual, restored in zip(self.residuals, state["residuals"], strict=True):
            residual.copy_(restored)

    def reset_rank_state(self):
        for residual in self.residuals:
            residual.zero_()


@register_algorithm("drifting")
@dataclass(frozen=True)
class Drifting(Algorithm):
    """Each rank trains alone, with noise of its own, until consensus takes the mean."""

    def bind(self, context):
        return _Drifting(context)
