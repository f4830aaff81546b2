"""Time and peak memory of every loss against eager PyTorch, torch.compile and importable peers.

One round runs all implementations one after the other, so that whatever else the machine does meets
all of them; a ratio is the median of the rounds' ratios. What is not fastkd's loss in value and
gradient is an error. PYTHONPATH=FOLDER finds the peers that fetch_peers.py has put there.
"""

import os
import shutil
import time

import peers
import torch
from cases import CASES
from meter import PeakMemory
from timing import Found, disagreement, step_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
CAN_COMPILE = CUDA or shutil.which("g++") is not None
COMPILED = 256 * 1000  # numbers at once; below, no training wins back the time of the compilation
MOST_COMPILED = 1 << 26  # from here on a CPU takes as long for the eager expression compiled
LARGE = 1 << 24  # numbers of a problem that a CPU takes seconds for
VERY_LONG = 20  # seconds of a round, from where one is all
COPIES = 6  # that eager and its backward have of their largest temporary
UNSEEN = ("torch.compile", "torch linear_cross_entropy")  # their buffers on a CPU
DIRECTIONS = ["forward", "forward+backward"]
PEERS, _ = peers.available()


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    only = option("only").split(",") if option("only") else [case.name for case in CASES]
    sizes = option("sizes").split(",") if option("sizes") else []
    chosen = [tuple(map(int, size.split("x"))) for size in sizes]
    problems = [
        (case, size)
        for case in CASES
        if case.name in only and option("family") in (None, case.family.name)
        for size in chosen or (case.family.gpu_sizes if CUDA else case.sizes)
        if chosen or not option("quick") or case.family.temporary(size) < LARGE
    ]
    names = [f"{case.name}-{'x'.join(map(str, size))}" for case, size in problems]
    metafunc.parametrize("case, size", problems, ids=names)
    metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    metafunc.parametrize("direction", DIRECTIONS)


def fits(largest: int) -> bool:
    """Whether a CPU has room for several of its bytes; a GPU says so itself."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return CUDA or COPIES * largest < 0.75 * memory


def implementations(case, size, dtype, quick: bool) -> dict:
    """By name, ours first: the others are compared with it. Those that fit."""
    losses = {"eager": case.eager}
    if CAN_COMPILE and COMPILED <= case.family.temporary(size) < MOST_COMPILED and not quick:
        torch.compiler.reset()
        losses["torch.compile"] = torch.compile(case.eager, dynamic=False)
    losses |= {name: peer[case.name] for name, peer in PEERS.items() if case.name in peer}

    def largest(name: str) -> int:
        return peers.TEMPORARIES.get(name, case.family.temporary)(size) * dtype.itemsize

    fitting = {name: loss for name, loss in losses.items() if fits(largest(name))}
    return {"fastkd": case.fastkd, **fitting}


def test_loss(benchmark, request, case, size, dtype, direction):
    torch.set_num_threads(1)
    quick = request.config.getoption("quick")
    inputs = case.inputs(size, dtype, DEVICE)
    steps, peaks, ours, round_seconds = {}, {}, None, 0.0
    for name, loss in implementations(case, size, dtype, quick).items():
        step = step_of(loss, inputs, direction)
        try:
            if CUDA or name in UNSEEN:
                value = step()  # compiles
            if CUDA or name not in UNSEEN:
                began = time.perf_counter()
                peaks[name], value = peak(step, inputs[0])
                round_seconds += time.perf_counter() - began
        except torch.OutOfMemoryError:
            pass  # what does not fit has no row
        except Exception:
            if name in ("fastkd", "eager"):  # the peers with kernels need a GPU
                raise
        else:
            steps[name] = step
            found = Found(value, inputs[0].grad)
            ours = ours or found
            # another convention is off by more than rounding
            if dtype == torch.float32 and (wrong := disagreement(found, ours, 1e-3)):
                raise ValueError(f"{case.name} of {name} is another loss: {wrong}")
        inputs[0].grad = found = None
    ours = None

    is_long = case.family.temporary(size) >= LARGE and not CUDA
    repeats, n_rounds = dict.fromkeys(steps, 1), 1 if round_seconds > VERY_LONG else 3
    if not is_long:
        once = {name: seconds_of(step, 1) for name, step in steps.items()}
        repeats = {name: max(1, min(200, int(0.01 / once[name]))) for name in steps}
        # a peer a hundred times as slow shall not take the time of all others
        n_rounds = 3 if quick else max(3, min(21, int(5 / sum(once.values()))))
    seconds = {name: [] for name in steps}

    def one_round():
        for name, step in steps.items():
            if not is_long:
                step()  # pays for what the one before left in the caches and in the allocator
            seconds[name].append(seconds_of(step, repeats[name]))

    # pytest-benchmark would time one implementation after the other: it gets whole rounds
    benchmark.pedantic(one_round, rounds=n_rounds)
    benchmark.extra_info.update(
        family=case.family.name,
        loss=case.name,
        shape=list(size),
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        rounds=seconds,
        peak_extra_bytes=peaks,
    )


def seconds_of(step, repeats: int) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise()
    return (time.perf_counter() - start) / repeats


def peak(step, student) -> tuple[int, torch.Tensor]:
    """The most bytes that a step allocates at once, its gradient included; and the loss."""
    if not CUDA:
        with PeakMemory() as memory:
            value = step()
        return memory.peak_bytes, value
    student.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = step()
    return torch.cuda.max_memory_allocated() - before, value


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()
