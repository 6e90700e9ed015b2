"""Clocks, traces, and what the machine can do at most."""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

IDLE_US = 10  # a longer gap between two kernels is not the GPU's own change from one to the next (1 to 3 us)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_ms(call: Callable, repeats: int = 20, warmup: int = 5, before: Callable | None = None) -> tuple[float, float]:
    """Median and spread (largest minus smallest) of one call, in milliseconds.

    By device events, without waiting between the calls, so that the host runs ahead as in training. ``before`` is
    called before each call, outside the measured time. Without a GPU the host's clock is read.
    """
    before = before or (lambda: None)
    for _ in range(warmup):
        before()
        call()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            before()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    else:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            before()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    return statistics.median(times), max(times) - min(times)


def host_ms(call: Callable, repeats: int = 5, before: Callable | None = None) -> float:
    """Median milliseconds until one call returns, its kernels enqueued on an idle GPU and not awaited.

    Where this is not below the time of the call, the GPU waits for the host.
    """
    times = []
    for _ in range(repeats):
        if before is not None:
            before()
        synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    synchronize()
    return statistics.median(times)


def trace(call: Callable, layers: int, repeats: int = 3, top: int = 25, before: Callable | None = None) -> dict:
    """What the GPU did in ``repeats`` calls: how busy it was, how often it waited, its longest kernels.

    Returns:
        ``busy`` (time in which a kernel ran, over the time from the first kernel to the end of the last); ``idle_ms``
        of a call, and of that ``waiting_ms`` in gaps longer than :data:`IDLE_US`: waiting for the host;
        ``gaps``, the longest of these, with the kernels around them; ``launches`` of kernels in a call and
        ``launches_per_layer``; ``kernels``, those that took most time, by their milliseconds in a call.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            if before is not None:
                before()
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    spans = sorted((e.time_range.start, e.time_range.end, e.name[:60]) for e in events)
    busy, gaps, until, last = 0.0, [], spans[0][0], ""
    for start, end, name in spans:  # kernels of several streams may overlap
        gaps.append((max(0.0, start - until), last, name))
        busy += max(0.0, end - max(start, until))
        until, last = max((until, last), (end, name))
    wall = until - spans[0][0]
    time_us, count = defaultdict(float), Counter()
    for event in events:
        time_us[event.name] += event.time_range.end - event.time_range.start
        count[event.name] += 1
    launches = sum(n for name, n in count.items() if not name.startswith(("Memcpy", "Memset"))) / repeats
    return {
        "busy": busy / wall,
        "wall_ms": wall / repeats / 1e3,
        "idle_ms": (wall - busy) / repeats / 1e3,
        "waiting_ms": sum(gap for gap, _, _ in gaps if gap > IDLE_US) / repeats / 1e3,
        "gaps": [{"us": gap, "behind": last, "before": name} for gap, last, name in sorted(gaps, reverse=True)[:10]],
        "launches": launches,
        "launches_per_layer": launches / layers,
        "kernels": [
            {"name": name[:120], "ms": time_us[name] / repeats / 1e3, "calls": count[name] / repeats}
            for name in sorted(time_us, key=time_us.get, reverse=True)[:top]
        ],
    }


def fp8_rate(m: int, n: int, k: int) -> float:
    """FLOP per second of ``torch._scaled_mm`` with scales per row."""
    a, b = (torch.randn(size, k, device="cuda").to(torch.float8_e4m3fn) for size in (m, n))
    ones = [torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")]
    ms, _ = time_ms(lambda: torch._scaled_mm(a, b.t(), *ones, out_dtype=torch.bfloat16, use_fast_accum=True))
    return 2 * m * n * k / (ms * 1e-3)


def bf16_rate(m: int, n: int, k: int) -> float:
    """FLOP per second of a product of BF16 matrices."""
    a, b = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (m, n))
    ms, _ = time_ms(lambda: a @ b.t())
    return 2 * m * n * k / (ms * 1e-3)


def copy_rate() -> float:
    """Bytes per second, read plus written, of a 1 GiB device copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ms, _ = time_ms(lambda: target.copy_(source))
    return 2 * source.numel() * 4 / (ms * 1e-3)


def attention_ms(batch: int, heads: int, length: int, head_dim: int) -> dict[str, float]:
    """Milliseconds of one causal attention, forward and backward, by each of sdpa's fused backends."""
    shape = (batch, length, heads, head_dim)
    q, k, v, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    times = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            times[name], _ = time_ms(
                lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves, dy)
            )
    return times
