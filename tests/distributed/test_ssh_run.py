"""`lightning-accel ssh-run`, with a stand-in for ssh that runs its command here, and with real sshds on two hosts."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from helpers import programs
from helpers.hosts import DEVICE, two_hosts
from lightning_accel.launch.hosts import Host, parse_hosts, read_hosts
from lightning_accel.launch.ssh_run import parse_variable

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch.py"

# As sshd does: the command goes through a shell, in the home folder. The words that ssh got are kept for the test.
FAKE_SSH = """#!{python}
import os, subprocess, sys
with open({log!r}, "a") as log:
    print(sys.argv[1:], file=log)
if "unreachable" in sys.argv:
    print("ssh: connect to host unreachable", file=sys.stderr)
    sys.exit(255)
os.chdir({home!r})
os.execv("/bin/sh", ["sh", "-c", sys.argv[-1]])
"""

SCRIPT = """
import json, os, signal, sys, time
if os.environ["RANK"] == "1" and sys.argv[1] == "fail":
    while not os.path.exists("rank 0 has said who it is"):
        time.sleep(0.01)
    sys.exit(9)
if sys.argv[1] in ("fail", "wait"):
    print("pid", os.getpid(), flush=True)
    open("rank 0 has said who it is", "w").close()
    time.sleep(120)
print(json.dumps([os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("TOKEN"), os.environ["OMP_NUM_THREADS"],
                  os.getcwd(), sys.argv[1:]]), flush=True)
"""


@pytest.fixture
def start(tmp_path, port):
    """Starts the command with the stand-in for ssh; ends it after the test."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    home = tmp_path / "home"
    home.mkdir()
    fake.write_text(FAKE_SSH.format(python=sys.executable, log=str(tmp_path / "ssh.log"), home=str(home)))
    fake.chmod(0o755)
    (tmp_path / "a script.py").write_text(SCRIPT)
    started = []

    def start(*words, hosts="one:22,two:2222", variables=(), options=()):
        named = ["--host-list", hosts] if isinstance(hosts, str) else ["--host-file", str(hosts)]
        command = [sys.executable, "-m", "lightning_accel.launch.cli", "ssh-run", *named]
        command += ["--workdir", str(tmp_path), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += [*options, *(word for variable in variables for word in ("--env", variable))]
        environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "TOKEN": "secret;$(id)\n'\""}
        environment = programs.ENVIRONMENT | environment
        started.append(programs.start(*command, "a script.py", *words, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_words_arrive_unchanged_and_secrets_stand_in_no_command_line(start, tmp_path):
    """Catches a shell on the way that takes words apart or executes them, and variables that `ps` shows."""
    words = ["--", "ok", "two words", "$(touch hacked)", "a;b", "'\"", "line\nbreak", "ü", "--workdir", "-x", "`id`", "--"]
    process = start(*words, variables=["TOKEN", "OTHER=1"], options=["--omp-threads", "3"])
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    lines = sorted(output.splitlines())
    for rank, (host, line) in enumerate(zip(("one", "two"), lines, strict=True)):
        prefix, _, said = line.partition("] [rank ")
        assert prefix == f"[{host}"
        assert json.loads(said.partition("] ")[2]) == [str(rank), "2", "secret;$(id)\n'\"", "3", str(tmp_path), words]
    seen = (tmp_path / "ssh.log").read_text()
    assert "secret" not in seen
    assert "a script" not in seen
    assert "'-p', '2222', '--', 'two'" in seen
    assert not (tmp_path / "hacked").exists()


def test_files_of_the_user_stand_in_for_no_module_and_hosts_come_from_a_file(start, tmp_path):
    """Catches `python -m`, which looks for modules in the home folder, where ssh starts it, and in the working folder first; and
    hosts that all get as many processes as the first one."""
    for path in (tmp_path / "home" / "json.py", tmp_path / "argparse.py"):
        path.write_text("raise RuntimeError('a file of the user was imported')\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("# both machines\none slots=1\n\ntwo:2222 slots = 2 max_slots=4  # larger\n")
    process = start("ok", hosts=hosts, options=["--omp-threads", "1"])
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    said = sorted(line.partition("] [rank ")[::2] for line in output.splitlines())
    assert [(host, *json.loads(words.partition("] ")[2])[:2]) for host, words in said] == [
        ("[one", "0", "3"),
        ("[two", "1", "3"),
        ("[two", "2", "3"),
    ]


@pytest.mark.parametrize("how", ["fail", "interrupt", "kill"])
def test_one_end_ends_all_and_leaves_nothing(start, how):
    """Catches hosts that go on, a wrong exit code, and processes that outlive the command, even one that is killed."""
    process = start("fail" if how == "fail" else "wait")
    pids = []
    while len(pids) < (1 if how == "fail" else 2):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        pids.append(int(line.split()[-1]))
    if how == "interrupt":
        os.kill(process.pid, signal.SIGINT)
    elif how == "kill":
        process.kill()
    _, errors = process.communicate(timeout=100)
    code = {"fail": 9, "interrupt": 130, "kill": -signal.SIGKILL}[how]
    assert process.returncode == code, errors
    if how == "fail":
        assert "lightning-accel ssh-run: two failed first, with exit code 9" in errors
    deadline = time.monotonic() + 30
    while any(map(programs.is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(programs.is_alive, pids))


def test_a_host_that_cannot_be_reached_ends_all(start):
    """Catches a wait for ranks that were never started."""
    process = start("wait", hosts="one,unreachable")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 255
    assert "[unreachable] ssh: connect to host unreachable" in errors
    assert "lightning-accel ssh-run: unreachable could not be reached by ssh" in errors


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--workdir", "/no/such/folder"],
            1,
            "[one] lightning-accel ssh-run: cannot start here: [Errno 2] No such file or directory",
        ),
        (["--python", "/no/such/python"], 127, "lightning-accel ssh-run: one failed first, with exit code 127"),
    ],
    ids=["workdir", "python"],
)
def test_what_a_host_lacks_is_one_line(start, options, code, message):
    """Catches the traceback of a process that the user does not know of."""
    process = start("wait", hosts="one", options=options)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code
    assert message in errors
    assert "Traceback" not in errors


def test_without_ssh_it_says_so():
    """Catches a traceback."""
    words = (sys.executable, "-m", "lightning_accel.launch.cli", "ssh-run", "--host-list", "one", "x.py")
    done = programs.run(*words, variables={"PATH": "/nowhere"})
    assert (done.returncode, done.stderr) == (
        1,
        "lightning-accel ssh-run: there is no ssh on PATH here: install OpenSSH's client\n",
    )


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h1:22,h2:2222", [Host("h1", 22), Host("h2", 2222)]),
        ("me@10.0.0.1", [Host("me@10.0.0.1", 22)]),
        ("a.b-c:65535", [Host("a.b-c", 65535)]),
    ],
)
def test_hosts_are_read(text, hosts):
    """Catches a port that gets lost."""
    assert parse_hosts(text) == hosts
    assert parse_hosts("me@x")[0].address == "x"


@pytest.mark.parametrize(
    "text", ["", "a,", "-oProxyCommand=x", "a b", "a;b", "$(id)", "a:0", "a:65536", "a:b", "a\n", "ä", "a,a"]
)
def test_hostile_hosts_are_refused(text):
    """Catches a host that ssh would take for an option, or a shell for a command."""
    with pytest.raises(Exception, match="host"):
        parse_hosts(text)


def test_a_host_file_is_read_and_its_mistakes_have_a_line(tmp_path):
    """Catches Open MPI's words taken for hosts, and slots that get lost."""
    path = tmp_path / "hosts"
    path.write_text("me@a:2222\nb slots=3 max-slots=3\n  # none\nc\n")
    assert read_hosts(str(path)) == [Host("me@a", 2222), Host("b", 22, 3), Host("c", 22)]
    for text, message in (
        ("a\nb slots=x", r"line 2: after the host there may be slots=N: got 'slots=x'"),
        ("a slots=0", "line 1: after the host"),
        ("a b", "line 1: after the host there may be slots=N: got 'b'"),
        ("a\n-oProxyCommand=x", "line 2: hosts must be like"),
        ("a\na slots=2", "each host must be listed once: got a:22 2 times"),
        ("# none", "lists no host"),
    ):
        path.write_text(text)
        with pytest.raises(Exception, match=message):
            read_hosts(str(path))


def test_variables_are_read(monkeypatch):
    """Catches a name that a shell or the system would take for something else."""
    monkeypatch.setenv("HERE", "a=b")
    assert parse_variable("HERE") == ("HERE", "a=b")
    assert parse_variable("X=1=2") == ("X", "1=2")
    assert parse_variable("X=") == ("X", "")
    for text in ("", "=1", "1A=2", "A B=1", "A;B=1", "NOT_SET_HERE"):
        with pytest.raises(Exception, match=r"must be NAME|is not set here"):
            parse_variable(text)


@pytest.fixture
def ssh_hosts(tmp_path):
    """Two hosts, each with an sshd of its own, on ports 22 and 2222; gives them and a folder with the user's key."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if os.geteuid() != 0 or shutil.which("ssh") is None or sshd is None:
        pytest.skip("needs root, ssh and sshd (openssh-server)")
    for name in ("host", "user"):
        programs.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons = []
    with two_hosts("10.79.0") as made:
        try:
            for host, port in zip(made, (22, 2222), strict=True):
                options = [f"Port={port}", f"ListenAddress={host.address}", f'HostKey="{tmp_path}/host"', "PidFile=none"]
                options += [f'AuthorizedKeysFile="{tmp_path}/user.pub"', "StrictModes=no", "UsePAM=no"]
                options += ["PermitRootLogin=prohibit-password"]
                words = host.inside(sshd, "-D", "-e", "-f", "/dev/null", *(word for o in options for word in ("-o", o)))
                log = tmp_path / f"sshd{port}.log"
                with log.open("w") as errors:
                    daemons.append(programs.start(*words, stdout=errors, stderr=errors))
                deadline = time.monotonic() + 30
                while "Server listening" not in log.read_text():
                    assert daemons[-1].poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.02)
            yield made, tmp_path
        finally:
            for daemon in daemons:
                daemon.kill()
                daemon.wait()


def ssh_run(ssh_hosts, *words):
    (first, second), folder = ssh_hosts
    command = [*first.inside(sys.executable), "-m", "lightning_accel.launch.cli", "ssh-run", "--workdir", folder]
    command += ["--host-list", f"{first.address}:22,{second.address}:2222", "--env", "PYTHONPATH", "--interface", DEVICE]
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    for option in (f'IdentityFile="{folder}/user"', "IdentitiesOnly=yes", *options):
        command += ["--ssh-option", option]
    return programs.start(*command, *words)


def test_two_hosts_train_the_example_over_ssh(ssh_hosts):
    """Catches what the stand-in for ssh does not have: other ports, other environments, connections of their own."""
    made, folder = ssh_hosts
    process = ssh_run(ssh_hosts, EXAMPLE, "--epochs", 1)
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert process.returncode == 0, errors + logs
    assert output.count("test accuracy") == 1
    assert output.startswith(f"[{made[0].address}] [rank 0] ")


def test_an_unplugged_host_ends_the_others(ssh_hosts):
    """Catches a command that waits for a connection which is dead, for what does not communicate itself."""
    made, folder = ssh_hosts
    (folder / "wait.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)\n")
    process = ssh_run(ssh_hosts, "--ssh-option", "ServerAliveInterval=1", "wait.py")
    try:
        pids = {}
        while len(pids) < 2:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            pids[line[1:].partition("]")[0]] = int(line.split()[-1])
        made[1].unplug()
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 255, errors
    assert f"lightning-accel ssh-run: {made[1].address} could not be reached by ssh, or its connection was lost" in errors
    assert not programs.is_alive(pids[made[0].address])
