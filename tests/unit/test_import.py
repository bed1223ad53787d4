"""What importing the package does, and does not."""

import sys

from helpers import programs

QUIET = """
import os, sys, threading
import torch
import torch.distributed as dist

def state():
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": [thread.name for thread in threading.enumerate()],
        "variables": dict(os.environ),
        "process group": dist.is_initialized(),
        "cuda": torch.cuda.is_initialized(),
        "threads for a kernel": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "ddp": {name: id(value) for name, value in vars(torch.nn.parallel.DistributedDataParallel).items()},
        "module": {name: id(value) for name, value in vars(torch.nn.Module).items()},
        "tensor": {name: id(value) for name, value in vars(torch.Tensor).items()},
        "all_reduce": id(dist.all_reduce),
    }

before = state()
import lightning_accel
import lightning_accel.algorithms, lightning_accel.data_parallel.replica, lightning_accel.reference.bytegrad
after = state()
for key in before:
    assert before[key] == after[key], f"importing changed: {key}"
assert "lightning.pytorch" not in sys.modules and "pytorch_lightning" not in sys.modules
lightning_accel.QAdam([torch.nn.Parameter(torch.zeros(1))], bagua_compat=True)
assert state()["module"] == before["module"], "an optimizer changed torch.nn.Module"
"""


def run(code: str) -> None:
    """In an interpreter of its own, which finds the package where this one does."""
    done = programs.run(sys.executable, "-W", "error::DeprecationWarning:lightning_accel", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_importing_starts_and_changes_nothing():
    """Catches a thread, a process group, a CUDA context, a patched class or a seed at import, and an import of Lightning."""
    run(QUIET)


COMMAND_LINE = """
import sys
import lightning_accel.launch.cli, lightning_accel.launch.node_agent, lightning_accel.environment
assert "torch" not in sys.modules
import lightning_accel
assert "wrap" in dir(lightning_accel)
assert lightning_accel.optim.Phase is not None and "torch" in sys.modules
assert lightning_accel.wrap is sys.modules["lightning_accel.data_parallel.wrap"].wrap
assert not hasattr(lightning_accel, "no_such_name")
"""


def test_the_command_line_does_not_wait_for_torch():
    """Catches two seconds before each message of the command, and before each host's part of `ssh-run`."""
    run(COMMAND_LINE)
