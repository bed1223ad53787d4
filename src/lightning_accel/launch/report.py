"""`lightning-accel env`: this process among all processes, and what training finds on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import socket
import struct
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_accel.environment import Environment, training_variables
from lightning_accel.version import __version__

_SIOCGIFADDR = 0x8915  # Linux's request for an interface's IPv4 address


def describe(environment: Environment) -> dict[str, Any]:
    """Returns the facts about this process and, on the first process of a node, about the machine; JSON can hold them."""
    facts: dict[str, Any] = {"process": {**asdict(environment), "description": str(environment)}}
    return facts | (describe_machine() if environment.local_rank == 0 else {})


def describe_machine() -> dict[str, Any]:
    """Returns the facts about this machine and the packages that are installed."""
    import torch
    import torch.distributed as dist

    from lightning_accel.native import kernels

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    known = ("gloo", "nccl", "mpi", "ucc", "xccl")
    return {
        "versions": {"lightning-accel": __version__, "python": platform.python_version(), **_versions()},
        "kernels": {
            "instruction_set": kernels.instruction_set(),
            "instruction_sets": kernels.instruction_sets(),
            "cuda_architectures": kernels.CUDA_ARCHITECTURES,
        },
        "gpus": [_describe_gpu(device) for device in devices],
        "backends": [name for name in known if getattr(dist, f"is_{name}_available", lambda: False)()],
        "interfaces": [_describe_interface(name) for _, name in socket.if_nameindex()],
        "threads": {
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
        },
        "variables": training_variables(),
    }


def render(facts: dict[str, Any]) -> str:
    """Returns the facts as lines for people to read."""
    lines = [facts["process"]["description"]] if "process" in facts else []
    if "versions" not in facts:
        return "\n".join(lines)
    kernels, threads = facts["kernels"], facts["threads"]
    lines.append(_line("versions", (f"{name} {number}" for name, number in facts["versions"].items())))
    lines.append(_line("kernels", [f"CPU {kernels['instruction_set']} (of {', '.join(kernels['instruction_sets'])})"]))
    lines.append(_line("", [f"CUDA for {kernels['cuda_architectures']}" if kernels["cuda_architectures"] else "CUDA: none"]))
    for place, gpu in enumerate(facts["gpus"]):
        architecture = f"architecture {gpu['architecture']}, {'has' if gpu['has_kernels'] else 'WITHOUT'} kernels"
        lines.append(_line("" if place else "GPUs", [f"{gpu['name']} ({gpu['memory_gib']} GiB, {architecture})"]))
    if not facts["gpus"]:
        lines.append(_line("GPUs", ["none"]))
    lines.append(_line("backends", facts["backends"]))
    for place, interface in enumerate(facts["interfaces"]):
        words = [interface["name"], *interface["addresses"], interface["state"], _speed(interface["speed_mbit_per_s"])]
        lines.append(_line("" if place else "interfaces", [" ".join(word for word in words if word)]))
    used = f"torch uses {threads['torch']} and {threads['torch_interop']} between operations"
    lines.append(_line("threads", [f"{threads['usable_cores']} of {threads['cores']} cores usable", used]))
    for place, (name, value) in enumerate(facts["variables"].items()):
        lines.append(_line("" if place else "variables", [f"{name}={value}"]))
    return "\n".join(lines)


def _line(heading: str, parts: Any) -> str:
    return f"{heading:<11} {', '.join(parts)}"


def _speed(mbit_per_s: int | None) -> str:
    if mbit_per_s is None:
        return ""
    return f"{mbit_per_s / 1000:g} Gbit/s" if mbit_per_s >= 1000 else f"{mbit_per_s} Mbit/s"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "lightning", "pytorch-lightning", "lightning-fabric"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _describe_gpu(device: Any) -> dict[str, Any]:
    import torch

    from lightning_accel.native import missing_kernels

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "architecture": f"{properties.major}{properties.minor}",
        "has_kernels": missing_kernels(device) is None,
    }


def _describe_interface(name: str) -> dict[str, Any]:
    folder = Path("/sys/class/net") / name
    speed = _read(folder / "speed")
    return {
        "name": name,
        "addresses": _addresses(name),
        "state": _read(folder / "operstate") or "unknown",
        # -1, or an error, where there is no cable or no real card.
        "speed_mbit_per_s": int(speed) if speed.isdecimal() else None,
    }


def _addresses(name: str) -> list[str]:
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        addresses.append(socket.inet_ntoa(answer[20:24]))
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        digits, *_, interface = line.split()
        if interface == name:
            addresses.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return addresses


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
