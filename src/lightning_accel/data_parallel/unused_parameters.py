"""The error about parameters that no loss has used, with a remedy that keeps the algorithm."""

from __future__ import annotations

import re

from torch.nn.parallel import DistributedDataParallel


def check_reduction(ddp: DistributedDataParallel, remedy: str) -> None:
    """Refuses a forward after a backward that left buckets unreduced, as DDP itself would right after.

    DDP's own message, and Lightning's advice on it, name a strategy or a constructor that would train without the algorithm.

    Args:
        ddp: Wrapped model.
        remedy: What to write so that DDP detects unused parameters.

    Raises:
        RuntimeError: If a parameter got no gradient in the last backward.
    """
    try:
        ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RuntimeError(
            f"the last backward gave no gradient to {_unused_parameters(ddp, str(error))}, so its communication did not finish. "
            f"If a step may leave parameters out, write {remedy}. Else let all outputs of forward take part in the loss"
        ) from error


def _unused_parameters(ddp: DistributedDataParallel, message: str) -> str:
    """Returns the names of the parameters whose positions DDP's message tells."""
    positions = re.search(r"did not receive grad for rank \d+: ([\d ]+)", message)
    names = [
        name
        for name, parameter in ddp.module.named_parameters()
        if parameter.requires_grad and name not in ddp.parameters_to_ignore
    ]
    unused = [names[int(position)] for position in positions[1].split() if int(position) < len(names)] if positions else []
    return ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "") or "some parameters"
