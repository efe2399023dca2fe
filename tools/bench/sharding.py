"""Measure the memory of each rank for a frozen model of 1.04B parameters, its loading, and the trained weights' size.

    python -m tools.bench.sharding DIR [--keep-activations]

DIR/llm is generated if it does not exist: a Llama of random bfloat16 weights (16 blocks of Llama 3.2 1B, 32,000 tokens)
in files of at most 500 MB. Then ZeRO-3 and FSDP2 on two ranks, and one process for comparison, load it with rarec's own
code, build RA-Rec in every block for training, and take two small steps, all on the CPU with one thread for each rank.
Blocks are recomputed (llm.gradient_checkpointing) unless --keep-activations is set; then ZeRO-3 takes 13 GB, not 9.

holds:   share of the bytes of the frozen weights that this process holds when it is ready to train: the storage of each
         tensor, be it a shard, a small weight that is kept whole, or a part of a memory-mapped file.
loading: seconds until it is ready, and peak memory until then: anonymous (RssAnon, sampled; memory of the process
         itself) and resident (VmHWM; with pages of the model's files, which the system may reclaim at any time).
steps:   peak anonymous memory in them, and the share of the frozen weights held afterwards.
weights: bytes of the trained weights in float16, as in a bundle, and their share of the language model's.

Memory is counted without what Python and its libraries took before loading.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rarec.config import VARIANTS, RunConfig
from rarec.config.method import Prompt
from rarec.models.build import SIDES, SourceShape, build_model, save_weights
from rarec.models.language_model import load_model
from rarec.models.towers import RaRec, SideBatch
from rarec.storage.directories import new_directory
from rarec.training.accelerator import build_engine, start_world
from rarec.training.engines import Engine, Optimisation
from tools.bench.measuring import Figure, at_most, memory, model_tree, options, print_table, sampled_memory
from tools.bench.scaling import finish, start
from tools.bench.small_runs import bytes_of, launched, llama, local, write_tokenizer

Figures = dict[str, float]
WAYS = {"ZeRO-3": ("zero3", 2), "FSDP2": ("fsdp2", 2), "one process": ("one", 1)}
"""The launcher's file and the number of ranks."""
GOALS = {"ZeRO-3": 100 * 1.05 / 2}
"""Goal for the share that a rank holds, in percent."""
FILE, MIB, DIM = 500e6, 2**20, 64
VARIANT, SOURCES = VARIANTS["per_layer"], {"id": SourceShape(DIM, 1)}
LLAMA = llama(2048, 8192, 16, vocab_size=32_000, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def make_llm(directory: Path) -> None:
    """Write the model file by file, with one file in memory at a time."""
    config, generator = LlamaConfig(**LLAMA), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: list[list[str]] = [[]]
    for name in shapes:
        if sum(2 * shapes[other].numel() for other in (*files[-1], name)) > FILE:
            files.append([])
        files[-1].append(name)
    with new_directory(directory) as temporary:
        file_of: dict[str, str] = {}
        for number, inside in enumerate(files, 1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file({name: weights(shapes[name], generator) for name in inside}, temporary / file, {"format": "pt"})
            file_of |= dict.fromkeys(inside, file)
        index = {"metadata": {"total_size": sum(2 * shape.numel() for shape in shapes.values())}, "weight_map": file_of}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index))
        config.save_pretrained(temporary)
        write_tokenizer(temporary, [Prompt().user])


def weights(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return random weights; ones for norms."""
    made = torch.ones(shape, dtype=torch.bfloat16)
    return made.normal_(std=0.02, generator=generator) if len(shape) > 1 else made


def frozen(model: nn.Module) -> list[nn.Parameter]:
    """Return the frozen parameters."""
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def measure(llm: Path, out: Path, recompute: bool) -> None:
    """Load and train on one rank, and write its figures, in bytes and seconds, to a file.

    `holds` and `after` are bytes of the frozen weights, before and after the steps, `whole` those of all ranks;
    `resident`, `loading` and `steps` are peaks of memory; `weights` are those of the bundle, by one process alone.
    """
    section = {"path": str(llm), "dtype": "bfloat16", "gradient_checkpointing": recompute}
    config = RunConfig.model_validate(model_tree(run={"dir": "-", "device": "cpu"}, llm=section))
    world = start_world(config)
    engine = build_engine(world, config)
    before, started = memory("VmRSS"), time.monotonic()
    with sampled_memory() as loading:
        model, optimisation = under_training(config, engine)
    seconds, most, holds = time.monotonic() - started, memory("VmHWM"), bytes_of(local(frozen(model.backbone)))
    with sampled_memory() as steps:
        for _ in range(2):
            step(model, optimisation)
    figures = {
        "whole": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in frozen(model.backbone)),
        "holds": holds,
        "after": bytes_of(local(frozen(model.backbone))),
        "seconds": seconds,
        "resident": (most - before) * MIB,
        "loading": (max(loading) - loading[0]) * MIB,
        "steps": (max(steps) - loading[0]) * MIB,
        "weights": weights_bytes(model, out / "weights") if world.size == 1 else 0,
    }
    (out / f"{world.rank}.json").write_text(json.dumps(figures))
    optimisation.end()


def under_training(config: RunConfig, engine: Engine) -> tuple[RaRec, Optimisation]:
    """Return RA-Rec before its first step."""
    with engine.loading(config.llm):
        loaded = load_model(config.llm, Path(config.run.dir))
    model = build_model(config, VARIANT, loaded, SOURCES, dict.fromkeys(SIDES, tuple(SOURCES)))
    for tower in (model.user, model.item):
        assert tower.alignment is not None
        for _, source in tower.alignment.named_sources():
            source.reset(torch.Generator().manual_seed(0))
    return model, engine.train(model.train(), config.train)


def step(model: RaRec, optimisation: Optimisation) -> None:
    """Take a step on two short prompts that begin with slots."""
    ids_BT, slots = torch.zeros(2, 12, dtype=torch.int64), torch.arange(model.user.slots["id"])
    side = SideBatch(ids_BT, torch.ones_like(ids_BT), slots.expand(2, -1), {"id": torch.randn(2, 1, DIM)})
    with optimisation.part(last=True):
        encoded = optimisation(dict.fromkeys(SIDES, side))
        optimisation.backward((encoded["user"].vectors_BZ - encoded["item"].vectors_BZ).square().sum())
    optimisation.update(1.0)


def weights_bytes(model: RaRec, directory: Path) -> int:
    """Write the trained weights as `rarec export` does, and return their bytes."""
    directory.mkdir()
    save_weights(model, directory, dtype=torch.float16)
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def on_all_ranks(way: str, llm: Path, flags: list[str]) -> list[Figures]:
    """Start this script on the ranks of an engine, and return the figures of each."""
    engine, ranks = WAYS[way]
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    with tempfile.TemporaryDirectory() as scratch:
        out, output = Path(scratch), Path(scratch) / "output.txt"
        command = launched(engine, ranks, "-m", "tools.bench.sharding", llm, "--rank", out, *flags)
        finish(start(command, cores, output), output)
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def lines(what: str, rank: Figures, goal: float | None) -> list[Figure]:
    """Return the rows of one rank."""
    share, after = (100 * rank[when] / rank["whole"] for when in ("holds", "after"))
    loading = f"{rank['seconds']:.0f} s, {rank['loading'] / 1e6:,.0f} MB, resident {rank['resident'] / 1e6:,.0f} MB"
    return [
        Figure(f"{what}: holds", f"{share:.2f}%") if goal is None else at_most(f"{what}: holds", share, goal, "%"),
        Figure("  loading", loading),
        Figure("  steps", f"{rank['steps'] / 1e6:,.0f} MB, {after:.2f}% after"),
    ]


def main() -> None:
    """Generate the model, start each engine in turn, print the table."""
    arguments = options(__doc__, "directory", keep_activations=False, rank=Path)
    if arguments.rank:  # where a rank, started by this script, writes
        measure(arguments.directory, arguments.rank, not arguments.keep_activations)
        return
    llm, flags = arguments.directory.resolve() / "llm", ["--keep-activations"] * arguments.keep_activations
    if not llm.exists():
        make_llm(llm)
    figures: list[Figure] = []
    for way, (_, ranks) in WAYS.items():
        measured = on_all_ranks(way, llm, flags)
        for rank, own in enumerate(measured):
            figures += lines(f"{way}, rank {rank}" if ranks > 1 else way, own, GOALS.get(way))
    alone = measured[0]
    figures.append(Figure("trained weights", f"{alone['weights'] / 1e6:,.1f} MB of {alone['whole'] / 1e6:,.0f} MB"))
    print_table([*figures, at_most("  its share", 100 * alone["weights"] / alone["whole"], 1, "%")])


if __name__ == "__main__":
    main()
