"""What the tests of this folder share: a small model, its data, and Trainers for ranks that exist already."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset

import lightning_accel

FEATURES, HIDDEN, CLASSES = 16, 33, 4
NUMEL = FEATURES * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
warnings.filterwarnings("ignore", ".*does not have many workers.*")


class Ranks(ClusterEnvironment):
    """The processes that run_ranks has started, with the default process group they have; on one node, or on several."""

    def __init__(self, rank: int, world_size: int, num_nodes: int = 1) -> None:
        self._rank, self._world_size, self._node_size = rank, world_size, world_size // num_nodes
        self._variables = dict(os.environ)

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        assert size == self._world_size

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        rank_zero_only.rank = rank

    def local_rank(self) -> int:
        return self._rank % self._node_size

    def node_rank(self) -> int:
        return self._rank // self._node_size

    def teardown(self) -> None:
        os.environ.clear()  # Lightning's launcher sets OMP_NUM_THREADS
        os.environ.update(self._variables)


class Points(Dataset):
    """`length` samples, each a function of its index alone."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(length, FEATURES, generator=generator)
        self.targets = torch.randn(length, CLASSES, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def points(steps: int, world_size: int) -> DataLoader:
    """Batches for `steps` steps of each rank."""
    return DataLoader(Points(2 * steps * world_size), batch_size=2)


class Net(pl.LightningModule):
    """A perceptron; the same weights whenever it is made. Keeps its weights after each step."""

    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(7)
        self.net = torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES))
        torch.set_rng_state(generator_state)
        self.learning_rate = learning_rate
        self.history: list[torch.Tensor] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])

    def on_train_batch_end(self, *args: Any) -> None:
        self.history.append(weights(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


def as_if_installed(folder: Path) -> dict[str, str]:
    """Variables for a clean interpreter that has the package's entry point, whether or not the package is installed."""
    metadata = folder / "lightning_accel-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-accel\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nlightning_accel = lightning_accel_autoload:activate\n")
    source = Path(lightning_accel.__file__).parent.parent
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    return {**variables, "PYTHONPATH": os.pathsep.join([str(folder), str(source)]), "GLOO_SOCKET_IFNAME": "lo"}


def weights(module: torch.nn.Module) -> torch.Tensor:
    """A copy of all parameters in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trainer(
    strategy: Any, rank: int, world_size: int, *, accelerator: str = "cpu", num_nodes: int = 1, **kwargs: Any
) -> pl.Trainer:
    """A quiet Trainer for one of the ranks. Ranks that share a GPU need a node each: Lightning takes no device twice."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    nodes = {"accelerator": accelerator, "num_nodes": num_nodes, "devices": world_size // num_nodes}
    plugins = [Ranks(rank, world_size, num_nodes), *kwargs.pop("plugins", [])]
    return pl.Trainer(strategy=strategy, plugins=plugins, **nodes, **{**quiet, **kwargs})


def fit(strategy: Any, rank: int, world_size: int, module: Any = None, steps: int = 20, **kwargs: Any) -> Any:
    """Trains for `steps` batches and gives the module, its Trainer as `module.trainer_of_fit`."""
    module = Net() if module is None else module
    module.trainer_of_fit = trainer(strategy, rank, world_size, **kwargs)
    module.trainer_of_fit.fit(module, points(steps, world_size))
    return module
