"""What a training program is: plain data, which prints as Python that makes it again, and hypothesis's strategies for it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from hypothesis import strategies as st

GRADIENT_ALGORITHMS = ("gradient_allreduce", "bytegrad", "qadam")
WEIGHT_ALGORITHMS = ("decentralized", "low_precision_decentralized", "async")
ALGORITHMS = GRADIENT_ALGORITHMS + WEIGHT_ALGORITHMS
CODECS = ("int8", "int4", "sign", "minmax_uint8", "fp16", "bf16", "none")


class _Short:
    """Prints the fields that differ from their defaults."""

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != _default(f)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


def _default(of: Any) -> Any:
    return of.default_factory() if callable(of.default_factory) else of.default


@dataclass(frozen=True, repr=False)
class Model(_Short):
    """Layers, and what makes them awkward. A *part* is a module that an optimizer may have: embedding, layers, the tied layer."""

    widths: tuple[int, ...] = (3, 2)
    """Sizes of the linear layers, input first."""
    embedding: int = 0
    """Rows of an embedding whose sum is added to the input; 0 for none."""
    batch_norm: bool = False
    tied: bool = False
    """A square layer, used twice under two names."""
    frozen: bool = False
    """A layer that needs no gradient and that nobody changes."""
    teacher: bool = False
    """A frozen copy of the first layer, which the loop moves towards the layer after each step."""
    growing: bool = False
    """A buffer that is not saved and grows with each forward of the last rank."""
    last_dtype: str = "float32"
    """Dtype of the last layer."""


@dataclass(frozen=True, repr=False)
class Optimizer(_Short):
    """An optimizer of some parts; those numbers are taken modulo the number of parts, and none means all."""

    kind: str = "sgd"
    parts: tuple[int, ...] = ()
    told: bool = True
    """Whether `wrap` gets it."""


@dataclass(frozen=True, repr=False)
class Train(_Short):
    """Rounds: micro-batches under no_sync, backwards that synchronise, a step of each optimizer."""

    times: int = 1
    unsynced: int = 0
    backwards: int = 1
    toggled: bool = False
    """Each optimizer has a backward of its own, during which the others' parameters need no gradient."""
    only: int | None = None
    """The optimizer that steps, modulo their number; None for all."""
    skipped_on: tuple[int, ...] = ()
    """Ranks on which a gradient scaler skips the steps."""


@dataclass(frozen=True, repr=False)
class Evaluate(_Short):
    """A consensus, and a forward without gradients."""

    accumulating: bool = False
    """Whether it comes between two micro-batches of a round."""
    ema: bool = False
    """Whether the average of the weights over time is in their place meanwhile."""


@dataclass(frozen=True, repr=False)
class Resume(_Short):
    """A save; unless the program is uninterrupted, a new model, new optimizers, another wrap and a load follow."""

    bucket_cap_mb: float = 25.0


@dataclass(frozen=True, repr=False)
class Remake(_Short):
    """Puts a new optimizer, which `wrap` never gets, in the place of one."""

    optimizer: int = 0


@dataclass(frozen=True, repr=False)
class Fail(_Short):
    """One rank raises inside its next forward."""

    rank: int = 0


@dataclass(frozen=True, repr=False)
class ExtraRound(_Short):
    """One rank makes a round more than the others."""

    rank: int = 0


Operation = Train | Evaluate | Resume | Remake | Fail | ExtraRound


@dataclass(frozen=True, repr=False)
class Program(_Short):
    """A training program for all ranks."""

    algorithm: str = "bytegrad"
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    nodes: int = 1
    model: Model = field(default_factory=Model)
    optimizers: tuple[Optimizer, ...] = (Optimizer(),)
    operations: tuple[Operation, ...] = (Train(),)
    bucket_cap_mb: float = 25.0
    lr: float = 0.02
    uninterrupted: bool = False
    """Whether `Resume` only saves."""

    def has(self, *kinds: type) -> bool:
        """Whether it has an operation of one of these kinds."""
        return any(isinstance(operation, kinds) for operation in self.operations)

    @property
    def trains(self) -> list[Train]:
        """Its operations that train."""
        return [operation for operation in self.operations if isinstance(operation, Train)]

    @property
    def is_toggled(self) -> bool:
        """Whether some backwards do not reach all parameters, so that DDP must look for unused ones."""
        return any(train.toggled for train in self.trains)

    @property
    def may_fail(self) -> bool:
        """Whether a failure is planned."""
        return self.has(Fail, ExtraRound)

    @property
    def exchanges_weights(self) -> bool:
        return self.algorithm in WEIGHT_ALGORITHMS

    @property
    def has_feedback(self) -> bool:
        """Whether codes keep what they lose."""
        codec, chosen = self.options.get("codec", "int8"), self.options.get("error_feedback")
        return self.algorithm == "bytegrad" and (codec in ("int4", "sign") if chosen is None else chosen)


_seldom = st.sampled_from((False, False, False, True))
BUCKETS = st.sampled_from((25.0, 0.0001, 0.001))


@st.composite
def programs(draw: st.DrawFn, algorithms: tuple[str, ...] = ALGORITHMS) -> Program:
    """Valid programs: what plain DDP would run too, but for planned failures."""
    algorithm = draw(st.sampled_from(algorithms))
    ranks = draw(st.sampled_from((2, 3, 4)))
    is_gradient = algorithm in GRADIENT_ALGORITHMS
    nodes = 2 if ranks == 4 and algorithm != "async" and draw(st.booleans()) else 1
    most = 1 if algorithm == "qadam" else 3  # a QAdam and another one cannot share weights
    optimizers = draw(st.lists(_optimizers(algorithm), min_size=1, max_size=most))
    if not any(optimizer.told for optimizer in optimizers):
        optimizers[0] = replace(optimizers[0], told=True)
    program = Program(
        algorithm=algorithm,
        options=draw(_options(algorithm, ranks // nodes if nodes == 1 else nodes)),
        ranks=ranks,
        nodes=nodes,
        model=draw(_models(is_gradient=is_gradient)),
        optimizers=tuple(optimizers),
        bucket_cap_mb=draw(BUCKETS),
    )
    operations = draw(st.lists(_operations(program), min_size=1, max_size=4))
    if draw(st.integers(0, 9)) == 9:  # these take as long as a timeout
        kind, rank = draw(st.sampled_from((Fail, ExtraRound))), draw(st.integers(0, ranks - 1))
        operations.insert(draw(st.integers(0, len(operations))), kind(rank))
    return replace(program, operations=tuple(operations))


@st.composite
def _options(draw: st.DrawFn, algorithm: str, peers: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if algorithm == "bytegrad":
        options["codec"] = draw(st.sampled_from(CODECS))
        if options["codec"] != "none":
            options["error_feedback"] = draw(st.sampled_from((None, True, True, False)))
    elif algorithm == "qadam":
        options["codec"] = draw(st.sampled_from(CODECS))
    elif algorithm == "gradient_allreduce":
        options["hierarchical"] = draw(st.sampled_from((False, "auto")))
    elif algorithm == "decentralized":
        if peers % 2 == 0:
            options["peer_selection_mode"] = draw(st.sampled_from(("all", "shift_one")))
        options["communication_interval"] = draw(st.sampled_from((1, 2)))
    elif algorithm == "low_precision_decentralized":
        options["codec"] = draw(st.sampled_from(("none", "int8", "fp16")))
        options["communication_interval"] = draw(st.sampled_from((1, 2)))
    else:
        options["sync_interval_ms"] = draw(st.sampled_from((1, 20)))
        options["warmup_steps"] = draw(st.sampled_from((0, 2)))
    return options


@st.composite
def _models(draw: st.DrawFn, *, is_gradient: bool) -> Model:
    sizes = st.sampled_from((2, 3, 7, 33, 130))
    return Model(
        widths=tuple(draw(st.lists(sizes, min_size=2, max_size=4))),
        embedding=draw(st.sampled_from((0, 5, 600))),
        batch_norm=draw(_seldom),
        tied=draw(_seldom),
        frozen=draw(_seldom),
        teacher=draw(_seldom),
        growing=not is_gradient and draw(_seldom) and draw(_seldom),  # DDP itself broadcasts buffers, and cannot do it
        last_dtype=draw(st.sampled_from(("float32", "float32", "float64", "bfloat16"))),
    )


@st.composite
def _optimizers(draw: st.DrawFn, algorithm: str) -> Optimizer:
    kind = "qadam" if algorithm == "qadam" else draw(st.sampled_from(("sgd", "momentum", "adam")))
    parts = draw(st.lists(st.integers(0, 4), max_size=2, unique=True))
    return Optimizer(kind, tuple(parts), told=algorithm == "qadam" or draw(st.sampled_from((True, True, False))))


def _operations(program: Program) -> st.SearchStrategy[Operation]:
    """Operations that go well."""
    ranks = st.integers(0, program.ranks - 1)
    if program.exchanges_weights:
        skips = st.lists(ranks, max_size=program.ranks, unique=True).map(lambda skipped: tuple(sorted(skipped)))
    else:  # gradients are the same everywhere, and so is a scaler's verdict
        skips = st.sampled_from(((), tuple(range(program.ranks))))
    trains = st.builds(
        Train,
        times=st.sampled_from((1, 2, 3, 30) if program.has_feedback else (1, 1, 1, 2, 2, 3, 12)),  # what is lost adds up
        unsynced=st.sampled_from((0, 1)),
        backwards=st.sampled_from((1, 1, 1, 3)),
        toggled=st.just(False) if program.algorithm in ("async", "qadam") else _seldom,
        only=st.none() if program.algorithm == "qadam" else st.sampled_from((None, None, 0, 1)),
        skipped_on=st.one_of(st.just(()), skips),
    )
    evaluations = st.builds(Evaluate, accumulating=st.booleans(), ema=st.booleans())
    if program.algorithm == "qadam":  # refuses an optimizer that is not told
        rare = [st.builds(Resume, BUCKETS)]
    else:
        rare = [st.builds(Resume, BUCKETS), st.builds(Remake, st.integers(0, 2))]
    # Not one_of: it takes a strategy that is named twice once.
    weighted = [trains] * 8 + [evaluations] * 3 + rare * 2
    return st.integers(0, len(weighted) - 1).flatmap(weighted.__getitem__)
