"""Weights averaged in the background."""

from torch import nn

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, replica_of


class AsyncModelAverageAlgorithm(Algorithm, name="async"):
    """The algorithm `async`: gradients are averaged in the first steps, then weights, in the background.

    Args:
        peer_selection_mode: "all", the only mode.
        sync_interval_ms: Milliseconds between averages.
        warmup_steps: Number of first steps, in which gradients are averaged.

    Raises:
        ValueError: If the mode is another one.
    """

    def __init__(self, peer_selection_mode: str = "all", sync_interval_ms: int = 500, warmup_steps: int = 0) -> None:
        if peer_selection_mode != "all":
            raise ValueError(f"async averages over all ranks: peer_selection_mode must be 'all': got {peer_selection_mode!r}")
        super().__init__(sync_interval_ms=sync_interval_ms, warmup_steps=warmup_steps)

    def abort(self, bagua_ddp: nn.Module) -> None:
        """Stops averaging in the background, before an evaluation and at the end. Collective and idempotent.

        Args:
            bagua_ddp: Module that `with_bagua` or Bagua's DistributedDataParallel has returned.
        """
        replica_of(bagua_ddp).pause()

    def resume(self, bagua_ddp: nn.Module) -> None:
        """Starts averaging again. Collective and idempotent."""
        replica_of(bagua_ddp).resume()
