"""The `rarec` command: one thin sub-command a stage. Heavy imports wait until a stage needs them."""

import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rarec.entry import console, guarded, open_context, say, stoppable
from rarec.errors import UserError

if TYPE_CHECKING:
    from rarec.stages.context import Context

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""RA-Rec: ID embeddings become soft prompts in every block of a frozen language model.

    A run is one YAML file and the stages below, in this order; each resumes by itself and refuses inputs that do not
    belong together. `rarec run CONFIG` does them all. Override fields like this: `rarec run CONFIG train.epochs=3`.""",
)
Config = Annotated[Path, typer.Argument(help="Run configuration, YAML. Ours lie in configs/runs/.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make it again, replacing what was made before.")]


def run_stage(name: str, config: Path | str, overrides: list[str] | None, fresh: bool = False) -> Any:
    """Run one stage by its name."""
    with stoppable():
        return import_module("rarec.stages.record").perform(open_context(config, overrides, fresh), name)


@app.command(rich_help_panel="Before")
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs in each machine.")] = 1,
    memory: Annotated[str | None, typer.Option(help="Of a GPU, as in 80GB; the device's own by default.")] = None,
    zero: Annotated[str | None, typer.Option(help="0 (DDP), 1, 2, 3 or fsdp2; what is advised by default.")] = None,
    machines: Annotated[int, typer.Option(help="Machines.")] = 1,
    device: Annotated[str, typer.Option(help="Kind of GPU, for speed: H100, A100, L40S, ...")] = "H100",
) -> None:
    """What training takes on these GPUs: memory, traffic, hours; whether it fits, on what engine, or what to change.

    Nothing is loaded but the language model's config.json. Next: the command that it prints
    """
    from rarec.planning.cluster import Cluster, parse_engine

    cluster = Cluster.of(gpus, machines, memory, device)
    engine = parse_engine(zero) if zero else None
    made = import_module("rarec.stages.plan").plan(open_context(config, overrides), cluster, engine)
    out = Console() if sys.stdout.isatty() else Console(width=120)
    words = shlex.join([str(config), *(overrides or [])])
    for part in import_module("rarec.planning.plan_table").render(made, words):
        print(part) if isinstance(part, str) else out.print(part)


@app.command(rich_help_panel="Stages, in order")
def prepare(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """1. Logs to a prepared dataset: ids, order, split. Next: rarec ids CONFIG"""
    run_stage("prepare", config, overrides, fresh)


@app.command(rich_help_panel="Stages, in order")
def ids(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """2. Train or import ID embeddings. Next: rarec shards CONFIG"""
    run_stage("ids", config, overrides, fresh)


@app.command(rich_help_panel="Stages, in order")
def shards(
    config: Config,
    overrides: Overrides = None,
    fresh: Fresh = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the shards that are there; make nothing.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="With --verify: look into every sample as well.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="With --verify: make again only what is broken.")] = False,
) -> None:
    """3. Select samples, cache text states, write shards. Next: rarec train CONFIG, or launch/train.py on ranks"""
    if ((repair or deep) and not verify) or (fresh and verify):
        raise UserError("--repair and --deep go with --verify, and --verify not with --fresh")
    if not verify:
        run_stage("shards", config, overrides, fresh)
        return
    with stoppable():
        context = open_context(config, overrides)
        print(import_module("rarec.stages.verify").verify(context, repair, deep))


@app.command(rich_help_panel="Stages, in order")
def train(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """4. Train every variant (as launch/train.py does). Next: rarec evaluate CONFIG, or launch/evaluate.py"""
    run_stage("train", config, overrides, fresh)


@app.command(rich_help_panel="Stages, in order")
def evaluate(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """5. Rank the whole catalogue with every variant (as launch/evaluate.py does). Next: rarec export CONFIG"""
    run_stage("evaluate", config, overrides, fresh)


@app.command(rich_help_panel="Stages, in order")
def export(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """6. Write the bundle to take away. Next: rarec report CONFIG"""
    run_stage("export", config, overrides, fresh)


@app.command(rich_help_panel="Stages, in order")
def report(config: Config, overrides: Overrides = None) -> None:
    """7. One HTML file of everything that was found. Next: open it in a browser"""
    print(run_stage("report", config, overrides))


@app.command(rich_help_panel="All at once")
def run(
    config: Config,
    overrides: Overrides = None,
    fresh: Fresh = False,
    stages: Annotated[str | None, typer.Option(help="Only these, as in 'prepare ids'; all by default.")] = None,
) -> None:
    """Every stage in order; what is done already stays. Ends with the table, and where report and bundle are."""
    with stoppable():
        context = open_context(config, overrides, fresh)
        module = import_module("rarec.stages.run")
        if stages is not None:
            module.run(context, module.named(stages))
            return
        module.run(context)
        show_results(context)


@app.command(rich_help_panel="All at once")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep, YAML. Ours lie in configs/sweeps/.")],
    overrides: Overrides = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the runs, each with its state; run nothing.")] = False,
    only: Annotated[str | None, typer.Option(help="A glob over the names of runs.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit what is not done, as arrays of jobs.")] = False,
    sbatch: Annotated[str, typer.Option(help="With --slurm: more options of sbatch, in one text.")] = "",
) -> None:
    """Many runs of one configuration, one after the other; what is done is skipped, what they share is made once."""
    if sbatch and not slurm:
        raise UserError("--sbatch is for jobs", "give it together with --slurm")
    if listed and slurm:
        raise UserError("--list prints the runs and --slurm submits them", "give one of the two")
    from rarec.sweep import command

    with stoppable():
        failed = command.sweep(file, overrides or [], only, say, console, listed, sbatch if slurm else None)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel="Afterwards")
def recommend(
    config: Config,
    overrides: Overrides = None,
    user: Annotated[str, typer.Option(help="The user's id, as in the log.")] = ...,  # type: ignore[assignment]
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    bundle: Annotated[Path | None, typer.Option(help="A bundle directory; the run's own by default.")] = None,
) -> None:
    """The best new items for one user, from the bundle."""
    context = open_context(config, overrides)
    for item, title in import_module("rarec.stages.export").recommend(context, user, k, bundle):
        print(f"{item}\t{title}")


@app.command(rich_help_panel="Afterwards")
def doctor() -> None:
    """What this machine can run: devices, engines, compilers, models, and what is missing."""
    from rarec.doctor import checks, doctor_table

    Console().print(doctor_table(checks()))


def show_results(context: "Context") -> None:
    """The table of variants and where everything lies, on standard output."""
    from rarec.evaluation.table import terminal_table
    from rarec.files import read_json

    out = Console() if sys.stdout.isatty() else Console(width=110)
    paths = context.paths
    out.print(terminal_table(read_json(paths.evaluation / "metrics.json"), ["hr@10", "hr@100", "ndcg@10", "mrr"]))
    figures = paths.evaluation / "metrics.json"
    print(f"report: {paths.report / 'report.html'}\nbundle: {paths.bundle}\nfigures: {figures}")


def _version(wanted: bool) -> None:
    if wanted:
        from rarec.doctor import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions of rarec and its stack.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `rarec` command."""
    guarded(app)
