"""Bagua's names over this package, for scripts written for Bagua: put `lightning_accel.` before `bagua` in their imports.

`import lightning_accel.bagua.torch_api as bagua`, or `import lightning_accel.bagua as bagua`, which has the same names.
Importing it adds `with_bagua` to torch's `nn.Module`, as Bagua does; nothing else in the package changes a class of torch's.
`docs/migrate.md` lists the differences.
"""

from lightning_accel.bagua.torch_api import *  # noqa: F403
from lightning_accel.bagua.torch_api import __all__ as __all__
