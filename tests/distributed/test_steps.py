"""The examples that go one step at a time, each for a few epochs. Step 3 is killed in test_plain.py, step 4 has hosts in
test_launchers.py.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[2] / "examples" / "steps"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "GLOO_SOCKET_IFNAME": "lo"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_are_short_and_listed():
    """Catches a step that nobody finds, or that grows."""
    scripts = sorted(STEPS.glob("*.py"))
    assert [script.name[0] for script in scripts] == ["1", "2", "3", "4", "5"]
    listed = (STEPS.parent / "README.md").read_text()
    for script in scripts:
        assert f"steps/{script.name})" in listed
        assert len(script.read_text().splitlines()) < 80


@pytest.mark.parametrize(
    ("script", "words", "said", "left"),
    [
        ("1_one_process.py", (), "", ()),
        ("2_spawn.py", ("--port", free_port()), ", 0.6 MB sent by each process", ()),
        ("4_several_nodes.py", ("--data", "data.pt"), "started by single process: rank=0", ("data.pt", "digits.pt")),
        ("5_lightning.py", ("--devices", 1), "", ("digits_snapshots/last.ckpt",)),
    ],
)
def test_a_step_learns(tmp_path, script, words, said, left):
    """Catches processes that train apart, names that have changed, and files in another place."""
    command = [sys.executable, STEPS / script, "--epochs", 3, *words]
    done = subprocess.run(
        [str(word) for word in command],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (percent,) = re.findall(r"test accuracy (\d+\.\d)%", done.stdout)
    assert float(percent) > 80
    assert said in done.stdout
    for name in left:
        assert (tmp_path / name).exists()
