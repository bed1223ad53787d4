"""The examples that go one step at a time, each for a few epochs. Step 3 is killed in test_plain.py, step 4 has hosts in
test_launchers.py.
"""

import re
import sys
from pathlib import Path

import pytest

from helpers import programs
from helpers.ranks import run_script

STEPS = Path(__file__).parents[2] / "examples" / "steps"


def test_all_are_short_and_listed():
    """Catches a step that nobody finds, or that grows."""
    scripts = sorted(STEPS.glob("*.py"))
    assert [script.name[0] for script in scripts] == ["1", "2", "3", "4", "5"]
    listed = (STEPS.parent / "README.md").read_text()
    for script in scripts:
        assert f"steps/{script.name})" in listed
        assert len(script.read_text().splitlines()) < 80


def check(said, percent_at_least=80):
    (percent,) = re.findall(r"test accuracy (\d+\.\d)%", said)
    assert float(percent) > percent_at_least


@pytest.mark.parametrize(
    ("script", "words", "start", "left"),
    [
        ("1_one_process.py", (), "", ()),
        ("4_several_nodes.py", ("--data", "data.pt"), "started by single process: rank=0", ("data.pt", "digits.pt")),
        ("5_lightning.py", ("--devices", 1), "", ("digits_snapshots/last.ckpt",)),
    ],
)
def test_a_step_learns(tmp_path, script, words, start, left):
    """Catches names that have changed, and files in another place."""
    (said,) = run_script(STEPS / script, 1, "--epochs", 3, *words, folder=tmp_path, launched=False)
    check(said)
    assert said.startswith(start)
    for name in left:
        assert (tmp_path / name).exists()


def test_the_step_that_spawns_learns(tmp_path, port):
    """Catches processes that train apart, and a program that cannot be started anew by itself."""
    done = programs.run(sys.executable, STEPS / "2_spawn.py", "--epochs", 3, "--port", port, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    assert ", 0.6 MB sent by each process" in done.stdout
