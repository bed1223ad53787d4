from collections.abc import Sequence

BLOCK_NUMEL: int
WIRE_ALIGNMENT: int
CUDA_ARCHITECTURES: str
MOST_PEERS: int
PEER_MESSAGES_OFFSET: int

class Plan:
    def __init__(
        self,
        codec: int,
        dtype: int,
        tensor_offsets: Sequence[int],
        numels: Sequence[int],
        wire_offsets: Sequence[int],
        residual_offsets: Sequence[int],
    ) -> None: ...
    @property
    def wire_bytes(self) -> int: ...
    @property
    def tensor_numel(self) -> int: ...
    @property
    def residual_numel(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def wire_offsets(self) -> list[int]: ...
    def segment_table(self) -> bytes: ...

def encode(
    plan: Plan,
    tensor: int,
    numel: int,
    wire: int,
    wire_bytes: int,
    old: int,
    updated: int,
    residual_numel: int,
    segments: int,
    stream: int,
) -> None: ...
def decode(plan: Plan, wire: int, wire_bytes: int, tensor: int, numel: int, segments: int, stream: int) -> None: ...
def decode_accumulate(
    plan: Plan, wire: int, wire_bytes: int, accumulator: int, numel: int, segments: int, stream: int
) -> None: ...
def decode_sum_encode(
    plan: Plan,
    messages: int,
    messages_bytes: int,
    count: int,
    stride_bytes: int,
    divisor: float,
    wire: int,
    wire_bytes: int,
    old: int,
    updated: int,
    residual_numel: int,
    segments: int,
    stream: int,
) -> None: ...
def peer_memory_bytes(num_messages: int, stride_bytes: int) -> int: ...
def peer_all_reduce(
    everything: Plan,
    own: Plan,
    stride_bytes: int,
    is_whole: bool,
    everything_segments: int,
    own_segments: int,
    tensor: int,
    numel: int,
    memory: Sequence[int],
    memory_bytes: int,
    rank: int,
    divisor: float,
    worker: tuple[int, int, int],
    server: tuple[int, int, int],
    failure: int,
    timeout_seconds: float,
    stream: int,
) -> None: ...
def qadam_fold(
    dtype: int,
    tensors: Sequence[tuple[int, int, int, int]],
    beta1: float,
    weight_decay: float,
    threads: int,
    is_cuda: bool,
    stream: int,
) -> None: ...
def qadam_step(
    dtype: int,
    tensors: Sequence[tuple[int, int, int, int, int]],
    step_size: float,
    correction: float,
    eps: float,
    decay: float,
    threads: int,
    is_cuda: bool,
    stream: int,
) -> None: ...
def mean(dtype: int, rows: int, count: int, out: int, numel: int, is_cuda: bool, stream: int) -> None: ...
def ring_difference(dtype: int, x: int, w: int, left: int, right: int, numel: int, is_cuda: bool, stream: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
