"""Compare `rarec plan` with measured memory and traffic: the real engines, taking real steps on two CPU ranks.

    python -m tools.bench.plan [--blocks 8] [--hidden 256] [--batch 64]

The model is a Llama with random weights, slots in every block and LoRA; a step has two micro-batches. On rank 0:

weights, gradients, Adam: the storages of parameters, of their shards, of DeepSpeed's flat copies and of the optimizer's
    states. A storage of several tensors counts once. Gradients are read after each micro-batch: the larger counts.
saved: what autograd packs in the forward pass (`saved_tensors_hooks`), each storage once, without parameters. Only for
    one process without recomputed blocks: with them, autograd packs nothing but placeholders.
step: the most bytes allocated at once in a step beyond those at its start, by PyTorch's profiler of the allocator:
    activations, gathered weights, buckets, gradients of the micro-batches.
sent: the bytes of calls to torch.distributed in a step (DDP's and FSDP2's own messages bypass it and are not measured).

DeepSpeed runs with buckets of 200,000 elements, a million live parameters and no persistent ones, because the shipped
limits are larger than so small a model; the plan uses the same values.
"""

import argparse
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarec.planning.step_time import step_traffic
from tools.bench.measuring import Figure, model_tree, print_table
from tools.bench.plan_ranks import LIMIT, LIVE, VARIANT, Case, calculator_of, train_on

LIMITS = {
    "reduce_bucket_size": LIMIT,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_live_parameters": LIVE,
    "stage3_max_reuse_distance": LIVE,
    "stage3_param_persistence_threshold": 0,
}
STATIC, TEMPORARY = 0.15, 0.25
"""Allowed relative errors of the plan."""
ROOT = Path(__file__).parents[2]


CASES = (
    *(Case("0", 1, recomputed, dtype) for dtype in ("float32", "bfloat16") for recomputed in (False, True)),
    *(Case(engine, 2, False) for engine in ("0", "1", "2", "3", "fsdp2")),
    *(Case(engine, 2, True) for engine in ("3", "fsdp2")),
)


def main() -> None:
    """Print the table; exit with code 1 if an error of the plan is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("blocks", 8), ("hidden", 256), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments, figures = parser.parse_args(), list[Figure]()
    with tempfile.TemporaryDirectory() as scratch:
        write_llm(Path(scratch) / "llm", arguments.blocks, arguments.hidden)
        for case in CASES:
            tree = run_tree(Path(scratch), case, arguments.batch)
            figures += compared(case, planned(case, tree), measured(case, tree, Path(scratch)))
    print_table(figures)
    raise SystemExit(any(figure.met is False for figure in figures))


def write_llm(path: Path, blocks: int, hidden: int) -> None:
    """Write a Llama with random weights, and a tokenizer of few words."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "vocab_size": 4000,
    }
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2)).save_pretrained(path)
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(path)


def run_tree(scratch: Path, case: Case, batch: int) -> dict[str, Any]:
    """Return the configuration of a run."""
    llm = {"path": str(scratch / "llm"), "dtype": case.dtype, "gradient_checkpointing": case.checkpointing}
    train = {"batch_size": batch, "accumulate": 2, "variants": [VARIANT]}
    return model_tree(run={"dir": str(scratch / "run"), "device": "cpu"}, llm=llm, train=train)


def planned(case: Case, tree: dict[str, Any]) -> dict[str, int]:
    """Return the plan's values of the figures that are measured."""
    calculator, setup = calculator_of(case, tree)
    memory, step = calculator.memory(VARIANT, setup), calculator.activations(VARIANT, setup)
    buckets = memory.buckets if case.engine in ("1", "2") else 0
    gradients = memory.gradients if case.engine in ("0", "1", "fsdp2") else 0  # allocated in a step, freed at its end
    model = calculator.meta_model(VARIANT, case.checkpointing)
    sent = step_traffic(model, case.engine, case.ranks, 2, step, case.checkpointing)
    return {
        "frozen weights": memory.frozen,
        "buffers": memory.buffers,
        "trainable parameters": memory.trainable,
        "gradients": memory.gradients,
        "Adam states": memory.optimizer,
        "saved": step.saved,
        "step": memory.activations + memory.gathered + buckets + gradients,
        "sent": sent.total,
    }


def compared(case: Case, plan: dict[str, int], found: dict[str, int]) -> list[Figure]:
    """Return a line for each measured figure."""
    lines = []
    for what, value in found.items():
        off, goal = plan[what] / value - 1, TEMPORARY if what in ("saved", "step", "sent") else STATIC
        figure = f"{value / 1e6:,.2f} MB, planned {plan[what] / 1e6:,.2f} ({off:+.1%})"
        lines.append(Figure(f"{case.name}: {what}", figure, f"within {goal:.0%}", abs(off) <= goal))
    return lines


def measured(case: Case, tree: dict[str, Any], scratch: Path) -> dict[str, int]:
    """Run a training and return the figures of rank 0."""
    out = scratch / "found.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    deepspeed = scratch / "deepspeed.json"
    if case.engine in ("1", "2", "3"):
        shipped = json.loads((ROOT / "configs" / "deepspeed" / f"zero{case.engine}.json").read_text())
        deepspeed.write_text(json.dumps({"zero_optimization": shipped["zero_optimization"] | LIMITS}))
    processes.spawn(  # type: ignore[attr-defined, no-untyped-call]
        train_on, (case, tree, port, str(deepspeed), str(out)), nprocs=case.ranks
    )
    found: dict[str, int] = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    main()
