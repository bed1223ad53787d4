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


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def facts(variables, **arguments):
    found = environment.detect(variables=variables, **arguments)
    places = found.rank, found.world_size, found.local_rank, found.local_world_size, found.node_rank
    return found.launcher, places, found.host, found.port


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("single process", (0, 1, 0, 1, 0), "127.0.0.1", 29500)),
        (TORCHRUN, ("torchrun", (5, 8, 1, 4, 1), "first", 1234)),
        (SLURM, ("SLURM", (5, 7, 2, 3, 1), "gpu07", 15000 + 4567)),
        (OPEN_MPI, ("Open MPI", (3, 4, 1, 2, 1), "10.0.0.1", 29500)),
        (MPICH, ("MPICH", (1, 2, 1, 2, 0), "127.0.0.1", 29500)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_launcher_is_understood(variables, expected):
    """Catches a variable of the wrong name, and SLURM's count of the wrong node."""
    assert facts(variables) == expected


def test_the_innermost_launcher_is_believed():
    """Catches torchrun or mpirun inside a SLURM job taken for srun."""
    assert facts(SLURM | OPEN_MPI)[0] == "Open MPI"
    assert facts(SLURM | OPEN_MPI | TORCHRUN)[0] == "torchrun"


def test_slurm_with_pmi_is_slurm():
    """Catches srun --mpi=pmi2, which sets PMI_RANK in every task, taken for MPICH."""
    assert facts(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "7"}) == facts(SLURM)


def test_what_a_launcher_leaves_out_can_be_given():
    """Catches arguments that are passed over in silence."""
    by_hand = {name: value for name, value in TORCHRUN.items() if not name.startswith(("LOCAL", "GROUP"))}
    assert facts(by_hand, local_rank=1, local_world_size=2)[1] == (5, 8, 1, 2, 2)
    assert facts(TORCHRUN, local_rank=3)[1] == (5, 8, 3, 4, 1)


def test_the_shell_of_a_slurm_job_is_no_task():
    """Catches a script run without srun that waits for tasks which were never started."""
    shell = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert facts(shell)[:2] == ("single process", (0, 1, 0, 1, 0))


def test_arguments_come_before_variables():
    """Catches a rank from one source and a world size from another."""
    expected = ("arguments", (1, 2, 1, 2, 0), "127.0.0.1", 7)
    assert facts(SLURM, rank=1, world_size=2, port=7) == expected
    assert facts(TORCHRUN, rank=1, world_size=2, host="127.0.0.1", port=7) == expected
    found = environment.detect(rank=3, world_size=4, local_rank=1, local_world_size=2, host="h", variables={})
    assert (found.local_rank, found.node_rank) == (1, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[7]", "gpu7"), ("gpu[007-009,12]", "gpu007"), ("r1n[1,4-5]x,z", "r1n1x"), ("a-1.b", "a-1.b")],
)
def test_the_first_host_of_a_job_is_found(nodes, host):
    """Catches leading zeros that get lost, and a list taken for a name."""
    assert facts(SLURM | {"SLURM_STEP_NODELIST": nodes})[2] == host


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({name: value for name, value in TORCHRUN.items() if name != "WORLD_SIZE"}, {}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, {}, "RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, {}, r"rank must be .* below world_size 8 \(WORLD_SIZE\): got 8 \(RANK\)"),
        (TORCHRUN | {"RANK": "-1"}, {}, r"got -1 \(RANK\)"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, {}, r"got 4 \(LOCAL_RANK\)"),
        (TORCHRUN | {"RANK": "two"}, {}, "RANK must be a whole number: got 'two'"),
        (TORCHRUN | {"RANK": ""}, {}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}, "LOCAL_RANK is not set.* give local_rank"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, {}, "local_world_size must be at most world_size"),
        ({**OPEN_MPI, "MASTER_ADDR": ""}, {}, "MASTER_ADDR is not set, and Open MPI does not tell"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, {}, "SLURM_STEP_TASKS_PER_NODE must be like"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, {}, "SLURM_STEP_NODELIST must be like"),
        (TORCHRUN | {"GROUP_RANK": "-1"}, {}, r"node_rank must be at least 0: got -1 \(GROUP_RANK\)"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, {}, r"port must be from 1 to 65535: got 65536 \(MASTER_PORT\)"),
        ({}, {"rank": 0, "world_size": 2, "port": 0}, r"port must be from 1 to 65535: got 0 \(argument\)"),
        ({}, {"rank": "0", "world_size": 2}, "rank must be a whole number: got '0'"),
        ({}, {"rank": 0, "world_size": True}, "world_size must be a whole number: got True"),
        ({}, {"rank": 0}, "world_size is missing"),
        ({}, {"world_size": 2}, "rank is missing"),
        ({}, {"rank": 2, "world_size": 2}, r"got 2 \(argument\)"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(variables, arguments, message):
    """Catches a run that waits for ranks which do not exist, or an error that leaves the user guessing."""
    with pytest.raises(ValueError, match=message):
        environment.detect(variables=variables, **arguments)


def test_numbers_may_be_numpys_and_a_single_process_needs_no_port():
    """Catches a check of types that asks for int alone, and one of what nobody uses."""
    numpy = pytest.importorskip("numpy")
    found = environment.detect(rank=numpy.int64(1), world_size=numpy.int32(2), port=numpy.uint16(7), host="a", variables={})
    assert (found.rank, found.world_size, found.port) == (1, 2, 7)
    assert type(found.rank) is int
    assert environment.detect(rank=0, world_size=1, variables={"MASTER_PORT": "0"}).world_size == 1


def test_it_says_where_it_knows_from():
    """Catches a description that leaves the user guessing which variable was believed."""
    text = str(environment.detect(variables=TORCHRUN))
    assert text.startswith("started by torchrun: ")
    for fact in ("rank=5 (RANK)", "world_size=8 (WORLD_SIZE)", "host=first (MASTER_ADDR)", "port=1234 (MASTER_PORT)"):
        assert fact in text
