"""The page for those who come from elsewhere: what it shows of ours runs, as it stands there."""

import re
import subprocess
from pathlib import Path

from helpers.ranks import run_script

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"

RUN = """
import pathlib, re, sys
import torch
import lightning_accel as accel

page = pathlib.Path(sys.argv[1]).read_text()
for number, block in enumerate(re.findall(r"<!-- runs -->\\n```python\\n(.*?)```", page, re.DOTALL)):
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    dataset = torch.utils.data.TensorDataset(torch.randn(16, 3), torch.randint(2, (16,)))
    names = {"model": model, "dataset": dataset, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    names |= {"loader": torch.utils.data.DataLoader(dataset, batch_size=8)}
    names |= {name: torch.nn.functional.cross_entropy for name in ("criterion", "loss_of")}
    exec(compile(block, f"block {number}", "exec"), names)
    trains = "backward()" in block
    assert trains != torch.equal(model.weight, before), block
    for wrapped in (names["model"], names.get("ddp"), names["model"].__dict__.get("bagua_ddp")):
        if isinstance(wrapped, accel.AccelDataParallel):
            accel.unwrap(wrapped)
    accel.destroy_process_group()
    print("ran", number)
"""


def test_what_it_shows_of_ours_runs(tmp_path):
    """Catches a name, an option or a file that the page promises and the package lacks."""
    (tmp_path / "run.py").write_text(RUN)
    (said,) = run_script(tmp_path / "run.py", 1, PAGE, folder=tmp_path, launched=False)
    assert len(re.findall("^ran", said, re.MULTILINE)) == 6


def test_the_command_that_changes_imports_changes_them(tmp_path):
    """Catches an expression that leaves an import, or changes what is none."""
    (command,) = re.findall(r"^(sed .*) train\.py$", PAGE.read_text(), re.MULTILINE)
    script = tmp_path / "train.py"
    script.write_text(
        "import bagua.torch_api as bagua\n    from bagua.torch_api import contrib\nimport baguasys\nbagua.get_rank()\n"
    )
    subprocess.run(f"{command} {script}", shell=True, check=True, timeout=10)
    assert script.read_text() == (
        "import lightning_accel.bagua.torch_api as bagua\n    from lightning_accel.bagua.torch_api import contrib\n"
        "import baguasys\nbagua.get_rank()\n"
    )
