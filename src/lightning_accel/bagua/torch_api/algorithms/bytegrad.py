"""Mean gradients at eight bits."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, by_nodes


class ByteGradAlgorithm(Algorithm, name="bytegrad"):
    """See `lightning_accel.ByteGrad`. The codec is `int8`, not Bagua's grid: as many bytes, a tenth of the error.

    Args:
        hierarchical: ranks of a node sum first. On a single node Bagua's True sums there and quantises the mean; here ranks
            exchange codes.
        average: the mean; False leaves the sum.
    """

    def __init__(self, hierarchical: bool = True, average: bool = True) -> None:
        super().__init__(hierarchical=by_nodes(hierarchical), average=average)
