"""Mean gradients at eight bits."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, translate_hierarchical


class ByteGradAlgorithm(Algorithm, name="bytegrad"):
    """The algorithm `lightning_accel.ByteGrad`. The codec is `int8`, not Bagua's grid: as many bytes, a tenth of the error.

    Args:
        hierarchical: Whether ranks of a node sum first. On a single node Bagua's True sums there and quantises the mean; here
            ranks exchange codes.
        average: Whether gradients are averaged; False leaves the sum.
    """

    def __init__(self, hierarchical: bool = True, average: bool = True) -> None:
        super().__init__(hierarchical=translate_hierarchical(hierarchical), average=average)
