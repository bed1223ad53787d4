"""The specification itself, where the answer is known by hand."""

import ast
from pathlib import Path

import pytest
import torch

import lightning_accel.reference
from helpers.tensors import CODECS
from lightning_accel.reference.bytegrad import bytegrad
from lightning_accel.reference.codecs import quantise
from lightning_accel.reference.gradient_allreduce import gradient_allreduce


def test_int8_by_hand():
    """Catches a specification that drifts along with the code: scale 1, so codes are the values, ties go to even."""
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 2.4, -126.6, 0.0])
    assert quantise(values, "int8").tolist() == [127, 0, 2, 2, 0, -2, 2, -127, 0]


def test_minmax_uint8_by_hand():
    """As above: range 255, so the step is 1, and the grid runs from max - 255 to max."""
    values = torch.tensor([200.0, -55.0, 0.5, 1.5, -0.5, 0.0])
    assert quantise(values, "minmax_uint8").tolist() == [200, -55, 0, 2, 0, 0]


@pytest.mark.parametrize("codec", CODECS)
def test_values_on_the_grid_stay(codec):
    """Catches a grid that is not reproduced by its own values: a second quantisation would drift."""
    grids = {"minmax_uint8": torch.arange(-128.0, 128.0), "int4": torch.arange(-7.0, 8.0), "sign": torch.tensor([1.0, -1.0] * 99)}
    values = grids.get(codec, torch.arange(-127.0, 128.0))
    assert torch.equal(quantise(values, codec), values)


def test_mean_by_hand():
    """Catches a mean that is a sum, or taken before the first quantisation."""
    ones, threes = [torch.full((3, 2), 1.0)], [torch.full((3, 2), 3.0)]
    assert bytegrad([ones, threes])[0].tolist() == [[2.0, 2.0]] * 3
    assert bytegrad([ones, threes], average=False)[0].tolist() == [[4.0, 4.0]] * 3
    assert gradient_allreduce([ones, threes])[0].tolist() == [[2.0, 2.0]] * 3
    assert gradient_allreduce([ones, threes], nodes=[[0, 1]], average=False)[0].tolist() == [[4.0, 4.0]] * 3
    # 0.4 of a step is lost on its way to the sum; were it quantised once only, twice 0.4 would round up to one.
    assert bytegrad([[torch.tensor([127.0, 0.4])]] * 2, average=False)[0].tolist() == [254.0, 0.0]


def test_nothing_is_quantised_on_a_single_node_or_rank():
    """Catches a specification that quantises where nothing leaves the node."""
    awkward = torch.tensor([127.0, 0.4])
    assert torch.equal(bytegrad([[awkward]])[0], awkward)
    assert torch.equal(bytegrad([[awkward], [awkward]], nodes=[[0, 1]])[0], awkward)
    assert not torch.equal(bytegrad([[awkward], [awkward]], nodes=[[0], [1]])[0], awkward)


def test_the_specification_imports_torch_alone():
    """Catches a reference that is computed with the code it is to judge."""
    for path in Path(lightning_accel.reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = ("torch", "__future__", "collections.abc", "dataclasses", "math", "lightning_accel.reference")
                assert name.startswith(allowed), f"{path.name} imports {name}"
