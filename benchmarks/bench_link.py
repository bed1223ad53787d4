"""A training step over a slow network: two hosts, made of network namespaces, with a link shaped to 1 Gbit/s between them.

    sudo .venv/bin/python benchmarks/bench_link.py

One rank in each namespace, a pair of virtual Ethernet devices between them, a token bucket at either end. Fits with each
strategy take turns, as in bench_step.py. What the link carries is measured first. Needs root, and `ip` and `tc` (iproute2).
The namespaces are removed at the end, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from _common import Bar, parser, save, show, show_bars
from _fits import MODELS, STRATEGIES, SUMMARY_COLUMNS, Place, Settings, measure, ratios, summary, summary_cells

_PORT = 29500  # free in a namespace of our own


class Link:
    """Two namespaces and a shaped link, for the time of a `with` block.

    Args:
        rate: in both directions, as `tc` writes it.
        burst: bytes that may pass at once; more than the largest packet that the kernel hands over (64 KiB).
        latency: longest time that a packet is queued, as `tc` writes it; what would wait longer is dropped.
        congestion_control: of TCP in the namespaces; None keeps the system's.
    """

    def __init__(self, rate: str, burst: str, latency: str, congestion_control: str | None) -> None:
        self._shape = ["rate", rate, "burst", burst, "latency", latency]
        self._congestion_control = congestion_control
        self.addresses = ("10.77.0.1", "10.77.0.2")
        # Names carry the process id: several runs may go on at once, and left-overs tell whose they were.
        self._names = [f"accel{os.getpid()}{end}" for end in "ab"]
        self._devices = [f"veth{os.getpid()}{end}" for end in "ab"]

    def __enter__(self) -> Link:
        try:
            for name in self._names:
                _command("ip", "netns", "add", name)
            first, second = self._devices
            _command(
                "ip",
                "link",
                "add",
                first,
                "netns",
                self._names[0],
                "type",
                "veth",
                "peer",
                "name",
                second,
                "netns",
                self._names[1],
            )
            for end, (device, address) in enumerate(zip(self._devices, self.addresses, strict=True)):
                self.run(end, "ip", "link", "set", "lo", "up")
                self.run(end, "ip", "address", "add", f"{address}/24", "dev", device)
                self.run(end, "ip", "link", "set", device, "up")
                self.run(end, "tc", "qdisc", "add", "dev", device, "root", "tbf", *self._shape)
                if self._congestion_control is not None:
                    self.run(end, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={self._congestion_control}")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._remove()

    def prefix(self, end: int) -> tuple[str, ...]:
        """What runs a command at one end."""
        return ("ip", "netns", "exec", self._names[end])

    def place(self, end: int) -> Place:
        """Where a rank at this end runs."""
        # These addresses have no names, and torch warns about each.
        return Place(self.prefix(end), {"GLOO_SOCKET_IFNAME": self._devices[end], "TORCH_CPP_LOG_LEVEL": "ERROR"})

    def run(self, end: int, *command: str) -> str:
        return _command(*self.prefix(end), *command)

    def rates(self, seconds: float, what: tuple[str, str]) -> list[float]:
        """Bit/s of payload that arrive over one TCP connection, at each end that receives."""
        program = str(Path(__file__).with_name("_rate.py"))
        common = [self.addresses[0], str(_PORT), str(seconds)]
        ends = [
            subprocess.Popen(
                [*self.prefix(end), sys.executable, program, role, *common, what[end]], stdout=subprocess.PIPE, text=True
            )
            for end, role in enumerate(("listen", "connect"))
        ]
        try:
            printed = [end.communicate(timeout=seconds + 60)[0] for end in ends]
        finally:
            for end in ends:
                end.kill()
        return [float(line) for line in printed if line]

    def congestion_control(self) -> str:
        return self.run(0, "sysctl", "-n", "net.ipv4.tcp_congestion_control").strip()

    def _remove(self) -> None:
        for name in self._names:  # their devices go with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rate", default="1gbit", help="of the link, as tc writes it (default: %(default)s)")
    arguments.add_argument("--burst", default="128kb", help="of the token bucket (default: %(default)s)")
    arguments.add_argument("--latency", default="10ms", help="longest queue at the link (default: %(default)s)")
    arguments.add_argument("--congestion-control", help="of TCP, such as cubic (default: the system's)")
    arguments.add_argument("--model", choices=MODELS, default="large")
    arguments.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="first ddp (default: all)"
    )
    arguments.add_argument("--rounds", type=int, default=6, help="of fits; two pairs each (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=25, help="of a fit (default: %(default)s)")
    arguments.add_argument("--bucket-cap-mb", type=float, help="of DDP, for all strategies alike (default: torch's own)")
    arguments.add_argument("--gradient-as-bucket-view", action="store_true", help="of DDP, for all strategies alike")
    args = arguments.parse_args()
    check_requirements()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # an exception, so that the namespaces go

    options: dict[str, object] = {"gradient_as_bucket_view": args.gradient_as_bucket_view}
    if args.bucket_cap_mb is not None:
        options["bucket_cap_mb"] = args.bucket_cap_mb
    settings = Settings(args.model, args.rounds, args.steps, strategies=tuple(args.strategies), ddp_options=options)
    model = MODELS[args.model]
    with Link(args.rate, args.burst, args.latency, args.congestion_control) as link:
        one_way, both_ways = link.rates(2, ("receive", "send"))[0], link.rates(2, ("both", "both"))
        control = link.congestion_control()
        megabits = [f"{rate / 1e6:.0f}" for rate in (one_way, *both_ways)]
        show(
            f"The link, shaped to {args.rate}, TCP {control}: Mbit/s that arrive",
            ("one way", "both ways at once, there", "and back"),
            [megabits],
        )
        fits = measure(settings, [link.place(0), link.place(1)], link.addresses[0], _PORT, num_nodes=2)
    rows = summary(fits)
    show(
        f"{args.model} model: {model.numel / 1e6:.2f} M parameters, batch size {model.batch_size}; 2 processes, {args.rate}",
        SUMMARY_COLUMNS,
        [summary_cells(row) for row in rows],
    )
    bars = []
    if "bytegrad" in args.strategies and (args.rate, args.model) == ("1gbit", "large"):
        fast = ratios(fits, "ddp", "bytegrad")
        bars.append(Bar("ddp's step takes at least 3.3 of bytegrad's", f"{fast:.2f}", fast.median >= 3.3))
        show_bars(bars)
    results = {
        "one_way_bits_per_second": one_way,
        "both_ways_bits_per_second": both_ways,
        "congestion_control": control,
        "summary": rows,
        "fits": [asdict(fit) for fit in fits],
    }
    save(args, results, bars)


def check_requirements() -> None:
    """Ends the program with what is missing, if anything is."""
    missing = [f"`{program}`, of the package iproute2" for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0:
        missing.append("root's rights: namespaces and shaping need them")
    if missing:
        sys.exit("bench_link.py lacks " + "; ".join(missing))


def _command(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
