"""What `rarec plan` says, beside what ranks really hold: the real engines, taking real steps on two CPU ranks.

    python tools/check_plan.py [--blocks 8] [--hidden 256] [--batch 64]

The model is a Llama of random weights with slots in every block and LoRA; a step has two parts. Measured on rank 0:

weights, gradients, Adam: the storages that parameters, their shards, DeepSpeed's flat copies and the optimizer's states
    have. A storage of several tensors counts once. Gradients are looked at after each part, and the larger is taken.
saved: what autograd packs in the forward pass (`saved_tensors_hooks`), storages once, without parameters. For one
    process, and where blocks are not recomputed, for then autograd packs nothing but placeholders.
step: the most that a whole step has allocated at once beyond what was there when it began, told by PyTorch's profiler
    from the allocator: activations, gathered weights, buckets, gradients of the parts.
sent: what goes through torch.distributed in a step (not DDP's and FSDP2's own messages, which bypass it).

DeepSpeed runs with buckets of 200,000 elements, a million live parameters and no persistent ones, for the shipped
limits are beyond so small a model; and the plan is made for the same.
"""

import argparse
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from check_plan_ranks import LIMIT, LIVE, VARIANT, Case, calculator_of, train_on
from measuring import Figure, print_table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarec.planning.traffic import traffic

LIMITS = {
    "reduce_bucket_size": LIMIT,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_live_parameters": LIVE,
    "stage3_max_reuse_distance": LIVE,
    "stage3_param_persistence_threshold": 0,
}
HELD, COMES = 0.15, 0.25
"""How far the plan may be off, of what is measured."""
ROOT = Path(__file__).parents[1]


CASES = (
    *(Case("0", 1, recomputed, dtype) for dtype in ("float32", "bfloat16") for recomputed in (False, True)),
    *(Case(stage, 2, False) for stage in ("0", "1", "2", "3", "fsdp2")),
    *(Case(stage, 2, True) for stage in ("3", "fsdp2")),
)


def main() -> None:
    """Print the table; exit code 1 where the plan is too far off."""
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
    """A Llama of random weights, and a tokenizer of few words."""
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
    """The run's configuration."""
    llm = {"path": str(scratch / "llm"), "dtype": case.dtype, "gradient_checkpointing": case.checkpointing}
    return {
        "run": {"dir": str(scratch / "run"), "device": "cpu"},
        "prepare": {
            "interactions": {"path": "-", "user": "-", "item": "-", "time": "-"},
            "items": {"path": "-", "item": "-", "title": "-"},
        },
        "llm": llm,
        "train": {"batch_size": batch, "accumulate": 2, "variants": [VARIANT]},
    }


def planned(case: Case, tree: dict[str, Any]) -> dict[str, int]:
    """What the plan says of the figures that are measured."""
    calculator, setting = calculator_of(case, tree)
    account, step = calculator.account(VARIANT, setting), calculator.step(VARIANT, setting)
    passing = account.buckets if case.stage in ("1", "2") else 0
    parts = account.gradients if case.stage in ("0", "1", "fsdp2") else 0  # made in a step, and forgotten at its end
    sent = traffic(calculator.variant(VARIANT, case.checkpointing), case.stage, case.ranks, 2, step, case.checkpointing)
    return {
        "frozen weights": account.frozen,
        "whitening, units": account.fixed,
        "what trains": account.trained,
        "gradients": account.gradients,
        "Adam": account.optimizer,
        "saved": step.saved,
        "step": account.training + account.gathered + passing + parts,
        "sent": sent.total,
    }


def compared(case: Case, plan: dict[str, int], found: dict[str, int]) -> list[Figure]:
    """A line for each figure that was measured."""
    lines = []
    for what, value in found.items():
        off, goal = plan[what] / value - 1, COMES if what in ("saved", "step", "sent") else HELD
        figure = f"{value / 1e6:,.2f} MB, planned {plan[what] / 1e6:,.2f} ({off:+.1%})"
        lines.append(Figure(f"{case.name}: {what}", figure, f"within {goal:.0%}", abs(off) <= goal))
    return lines


def measured(case: Case, tree: dict[str, Any], scratch: Path) -> dict[str, int]:
    """What rank 0 of a training has."""
    out = scratch / "found.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    deepspeed = scratch / "deepspeed.json"
    if case.stage in ("1", "2", "3"):
        shipped = json.loads((ROOT / "configs" / "deepspeed" / f"zero{case.stage}.json").read_text())
        deepspeed.write_text(json.dumps({"zero_optimization": shipped["zero_optimization"] | LIMITS}))
    processes.spawn(  # type: ignore[attr-defined, no-untyped-call]
        train_on, (case, tree, port, str(deepspeed), str(out)), nprocs=case.ranks
    )
    found: dict[str, int] = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    main()
