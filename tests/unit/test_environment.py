"""What is read of the environment."""

import socket

import pytest

from lightning_accel import environment


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("GROUP_RANK", raising=False)
    monkeypatch.delenv("NODE_RANK", raising=False)


def test_without_a_launcher_the_host_is_the_node():
    """Catches one name for all machines, which would take the network for a node's inside."""
    assert environment.node_name() == socket.gethostname()


@pytest.mark.parametrize("variable", ["GROUP_RANK", "NODE_RANK"])
def test_a_launcher_knows_better_than_the_host(monkeypatch, variable):
    """Catches hosts of equal name taken for one node, as containers often have."""
    monkeypatch.setenv(variable, "0")
    first = environment.node_name()
    monkeypatch.setenv(variable, "1")
    assert environment.node_name() != first
    assert socket.gethostname() not in (first, environment.node_name())


def test_an_empty_variable_is_no_answer(monkeypatch):
    """Catches `is not None`: some launchers export the variable empty."""
    monkeypatch.setenv("GROUP_RANK", "")
    assert environment.node_name() == socket.gethostname()
