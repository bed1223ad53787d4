"""Measures training steps over a slow network: two network namespaces act as hosts, with a link of 1 Gbit/s between them.

    sudo .venv/bin/python benchmarks/bench_link.py

One rank runs in each namespace. A pair of virtual Ethernet devices, each with a token bucket, joins them. Strategies take turns,
as in bench_step.py. The link's throughput is measured first. The program needs root, `ip` and `tc` (iproute2). It always removes
the namespaces at the end.
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

_PORT = 29500  # always free, as the namespace is new


class Link:
    """Creates two namespaces and a shaped link between them for the time of a `with` block.

    Args:
        rate: Rate in each direction, in the notation of `tc`.
        burst: Bytes that may pass at once; more than the kernel's largest packet (64 KiB).
        latency: Longest time that a packet is queued, in the notation of `tc`; packets that would wait longer are dropped.
        congestion_control: TCP's congestion control in the namespaces; None keeps the system's.
    """

    def __init__(self, rate: str, burst: str, latency: str, congestion_control: str | None) -> None:
        self._shape = ["rate", rate, "burst", burst, "latency", latency]
        self._congestion_control = congestion_control
        self.addresses = ("10.77.0.1", "10.77.0.2")
        # Names carry the process id, so that several runs may go on at once, and left-overs show whose they are.
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
        """Returns the prefix of a command that runs at one end."""
        return ("ip", "netns", "exec", self._names[end])

    def place(self, end: int) -> Place:
        """Returns the place of a rank at one end."""
        # The addresses have no names; torch would warn about each.
        return Place(self.prefix(end), {"GLOO_SOCKET_IFNAME": self._devices[end], "TORCH_CPP_LOG_LEVEL": "ERROR"})

    def run(self, end: int, *command: str) -> str:
        return _command(*self.prefix(end), *command)

    def rates(self, seconds: float, what: tuple[str, str]) -> list[float]:
        """Measures the bit/s of payload over one TCP connection, at each end that receives."""
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
        for name in self._names:  # removes their devices too
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rate", default="1gbit", help="rate of the link, in tc's notation (default: %(default)s)")
    arguments.add_argument("--burst", default="128kb", help="burst of the token bucket (default: %(default)s)")
    arguments.add_argument("--latency", default="10ms", help="longest time in the link's queue (default: %(default)s)")
    arguments.add_argument("--congestion-control", help="TCP's congestion control, such as cubic (default: the system's)")
    arguments.add_argument("--model", choices=MODELS, default="large")
    arguments.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="strategies, ddp first (default: all)"
    )
    arguments.add_argument("--rounds", type=int, default=6, help="rounds of fits, with two pairs each (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=25, help="steps of a fit (default: %(default)s)")
    arguments.add_argument("--bucket-cap-mb", type=float, help="DDP's option, for all strategies (default: torch's)")
    arguments.add_argument("--gradient-as-bucket-view", action="store_true", help="DDP's option, for all strategies")
    args = arguments.parse_args()
    check_requirements()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # an exception, so that the namespaces are removed

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
            f"Throughput of the link, shaped to {args.rate}, with TCP {control}: Mbit/s",
            ("one way", "both ways at once: there", "back"),
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
        bars.append(Bar("bytegrad is at least 3.3 times as fast as ddp", f"{fast:.2f}", fast.median >= 3.3))
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
    """Exits with a list of what is missing, if anything is."""
    missing = [f"`{program}` (from the package iproute2)" for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0:
        missing.append("root's rights (for namespaces and traffic shaping)")
    if missing:
        sys.exit("bench_link.py needs " + "; ".join(missing))


def _command(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
