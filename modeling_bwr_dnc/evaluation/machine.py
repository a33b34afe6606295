"""What a machine can do, what else it is doing, and how much memory a process took."""

import gc
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import transformers

from ..allocator import trim_freed_memory
from ..linear import linear

REPOSITORY = Path(__file__).parent.parent.parent


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# "processor" counts the seconds in which this process really ran, all threads together: what remains comparable, with one
# thread, on a machine that others keep busy.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def timed(function: Callable[[], object], device: str = "cpu", clock: str = "wall") -> float:
    """Seconds that one call takes, until the device has finished it."""
    synchronize(device)
    began = CLOCKS[clock]()
    function()
    synchronize(device)
    return CLOCKS[clock]() - began


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, clock: str = "wall") -> float:
    """Floating point operations per second of the best of some square matrix products, by torch's library or by `linear`'s."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for product in (lambda: left @ right, lambda: linear(left, right)):
        timed(product, device)
        seconds += [timed(product, device, clock) for _ in range(5)]
    return 2.0 * size**3 / min(seconds)


def memory_bandwidth(device: str = "cpu", num_bytes: int = 1 << 30, clock: str = "wall") -> float:
    """Bytes per second of the best of reading (a matrix times a vector, a sum) and copying `num_bytes`, in float32."""
    matrix = torch.ones(num_bytes // 4096 // 4, 4096, device=device)
    vector, copy = torch.ones(4096, device=device), torch.empty_like(matrix)
    moved = {
        matrix.nbytes: [lambda: matrix @ vector, lambda: matrix.sum()],
        2 * matrix.nbytes: [lambda: copy.copy_(matrix)],
    }
    rates = []
    for nbytes, functions in moved.items():
        for function in functions:
            timed(function, device)
            rates.append(nbytes / min(timed(function, device, clock) for _ in range(3)))
    return max(rates)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak_memory(device: str = "cpu") -> int:
    """
    Largest number of bytes that this process has had resident (CPU), or that the allocator has handed out (CUDA), since
    it began or since `reset_peak_memory`.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss, it does not start from what the parent process had resident.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: str = "cpu") -> bool:
    """
    Let `peak_memory` count from what is in use now; what was freed is given back first.

    Returns whether it does: of the peak of a process only Linux can be asked to forget it.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    trim_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left, or, by what its allocator says, the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def in_fresh_process(function: Callable, *arguments, timeout: float | None = None):
    """
    What `function(*arguments)` returns in a new interpreter; both must be importable and picklable.

    Args:
        timeout: seconds after which the process is stopped (None: never).

    Raises:
        ValueError: if the process ended without a result, such as one that ran out of memory or of time.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            result, error = receiver.recv()
        else:
            process.kill()
            result, error = None, f"was stopped after {timeout:.0f} s, when its time was over"
    except EOFError:
        process.join()
        result, error = None, f"ended with exit code {process.exitcode} (-9: most likely out of memory)"
    process.join()
    if error is not None:
        raise ValueError(f"{function.__name__} in a fresh process: {error}")
    return result


def _send_result(sender, function: Callable, arguments: tuple) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


# ---------------------------------------------------------------------------------------------------------------------
# Which machine, and how much of it others used
# ---------------------------------------------------------------------------------------------------------------------


def describe_machine(device: str = "cpu") -> dict:
    """Hardware, versions, commit and date: without them a number means nothing."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return described | {"commit": _commit()}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of this checkout, "+" behind it if the package differs from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "modeling_bwr_dnc"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if commit.returncode != 0:
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


class OtherLoad:
    """Share of the machine's processor time that went to others since this object was made; None where unknown."""

    def __init__(self):
        self.began, self.busy, self.own = time.perf_counter(), self._busy(), self._own()

    def share(self) -> float | None:
        busy = self._busy()
        if busy is None or self.busy is None:
            return None
        available = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        others = (busy - self.busy) - (self._own() - self.own)
        return min(max(others / available, 0.0), 1.0) if available > 0 else None

    @staticmethod
    def _busy() -> float | None:
        """Seconds of all processors that were not idle, time taken by the hypervisor included."""
        path = Path("/proc/stat")
        if not path.is_file():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        """Seconds of this process and of those it has waited for."""
        return sum(os.times()[:4])


def middle(values: list[float]) -> float:
    return float(median(values))
