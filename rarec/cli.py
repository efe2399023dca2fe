"""The `rarec` command: one thin sub-command a stage. Heavy imports wait until a command needs them."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from rarec.cli_bundle import (
    LanguageModel,
    Overrides,
    Trust,
    clicks,
    items,
    open_bundle,
    realign,
    recommend,
    serve,
    vectors,
)
from rarec.console.inert import in_one_line
from rarec.console.progress import Console, console, say
from rarec.entry import open_run, run_stage, write_example
from rarec.errors import EXIT_CODE, UserError
from rarec.stages import STAGES

if TYPE_CHECKING:
    from rarec.stages.run import Run

IN_ORDER, OF_A_BUNDLE = "Stages, in order", "With a bundle"
SHOWN = 3
"""Items of the example at the end of a run: of the history, and recommended."""
_NAME, _COMPLETE = "rarec", "_RAREC_COMPLETE"
_UsageError: Any = typer.BadParameter.__base__
"""Any mistake in the arguments; Typer does not export it."""
app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""RA-Rec: ID embeddings become soft prompts in every block of a frozen language model.

    A run is one YAML file and the stages below, in this order; each resumes by itself and refuses inputs that do not
    belong together. `rarec run CONFIG` does them all. Override fields like this: `rarec run CONFIG train.epochs=3`.""",
)
Config = Annotated[Path, typer.Argument(help="Run configuration, YAML. Start from `rarec init`.", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Rebuild; what is there stays until its replacement is whole.")]


@app.command(rich_help_panel="Before")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to start; made if need be.")],
    example: Annotated[str, typer.Option(help="demo, mine (your own log) or beauty.")] = "mine",
) -> None:
    """Write a commented configuration to start from, and what launchers and SLURM need. Next: rarec run"""
    config = write_example(directory, example)
    print(f"{config}: read it, then:\n  cd {shlex.quote(str(directory))} && rarec run {config.name}")


@app.command(rich_help_panel="Before")
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in each machine.")] = 1,
    memory: Annotated[str | None, typer.Option(help="Of a GPU, as in 80GB; by default that of the device.")] = None,
    zero: Annotated[str | None, typer.Option(help="0 (DDP), 1, 2, 3 or fsdp2; by default the advised one.")] = None,
    machines: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    device: Annotated[str, typer.Option(help="Kind of GPU, for speed: H100, A100, L40S, ...")] = "H100",
) -> None:
    """Say what training takes on these GPUs: memory, traffic, hours; whether it fits, by which engine, what to change.

    Nothing is loaded but the language model's config.json. Next: the command that it prints
    """
    from rarec.planning.setup import Cluster, parse_engine

    cluster = Cluster.of(gpus, machines, memory, device)
    engine = parse_engine(zero) if zero else None
    made = import_module("rarec.stages.train").plan(open_run(config, overrides), cluster, engine)
    out = Console() if sys.stdout.isatty() else Console(width=120)
    words = shlex.join([str(config), *(overrides or [])])
    for part in import_module("rarec.planning.plan_table").render(made, words):
        print(part) if isinstance(part, str) else out.print(part)


def _command(name: str) -> Callable[[Path, list[str] | None, bool], None]:
    """Return the command of a stage."""

    def command(config: Config, overrides: Overrides = None, fresh: Fresh = False) -> None:
        run_stage(name, config, overrides, fresh)

    return command


def _help(name: str) -> str:
    """Return a stage's help: its place, what it does, the command after it."""
    names = list(STAGES)
    place = names.index(name) + 1
    then = f"rarec {names[place]} CONFIG" if place < len(names) else "open it in a browser"
    return f"{place}. {STAGES[name].summary} Next: {then}"


def shards(
    config: Config,
    overrides: Overrides = None,
    fresh: Fresh = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the shards that are there; build nothing.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="With --verify: look into every sample as well.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="With --verify: rebuild only what is broken.")] = False,
) -> None:
    """Build, check or repair the shards."""
    if ((repair or deep) and not verify) or (fresh and verify):
        problem = "--repair and --deep go with --verify, and --verify not with --fresh"
        raise UserError(problem, "see rarec shards --help")
    if verify:
        print(import_module("rarec.stages.shard_content").verify(open_run(config, overrides), repair, deep))
    else:
        run_stage("shards", config, overrides, fresh)


def export(
    config: Annotated[Path, typer.Argument(help="Run configuration, YAML; with --to a bundle.", show_default=False)],
    overrides: Overrides = None,
    fresh: Fresh = False,
    with_llm: Annotated[bool, typer.Option("--with-llm", help="Put the language model into the bundle.")] = False,
    to: Annotated[list[str] | None, typer.Option(help="Of a bundle: vectors, faiss, onnx, vllm, peft or hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: of --to, or of a further bundle.")] = None,
    index: Annotated[str | None, typer.Option(help="With --to faiss: flat (default), hnsw, ivf or sqfp16.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="With --index hnsw or ivf: how much a search looks at.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --to onnx: in 8-bit integers as well.")] = False,
    push: Annotated[str | None, typer.Option(help="With --to hub: upload to NAME/REPOSITORY.")] = None,
    llm: LanguageModel = None,
    trust: Trust = None,
) -> None:
    """Write the bundle, or a bundle in other forms."""
    given = {"index": index, "depth": depth, "int8": int8, "push": push}
    options = {name: value for name, value in given.items() if value}
    if not to:
        _refuse_given("needs --to", **options, llm=llm, trust=trust)
        words = [*(overrides or []), *(["export.with_llm=true"] if with_llm else [])]
        run_stage("export", config, words, fresh, str(out.absolute()) if out else None)
        return
    _refuse_given("cannot be used with --to", overrides=overrides, fresh=fresh, with_llm=with_llm)
    if out is None:
        raise UserError("--to needs a folder to write to", "name it: --out DIR")
    import_module("rarec.export").write_targets(open_bundle(config, llm, "cpu", trust), to, out, say, **options)
    say(str(out))


def _refuse_given(why: str, **options: object) -> None:
    """Refuse the first option that was given, since it would do nothing."""
    for name, given in options.items():
        if given:
            shown = "OVERRIDES" if name == "overrides" else f"--{name.replace('_', '-')}"
            remedy = "a bundle: rarec export CONFIG; another form of one: rarec export BUNDLE --to FORM --out DIR"
            raise UserError(f"rarec export: {shown} {why}", remedy)


_OWN: dict[str, Callable[..., None]] = {"shards": shards, "export": export}
for _name in STAGES:
    _does = _OWN.get(_name) or _command(_name)
    app.command(_name, help=_help(_name), rich_help_panel=IN_ORDER)(_does)


@app.command(rich_help_panel="All at once")
def run(
    config: Config,
    overrides: Overrides = None,
    fresh: Fresh = False,
    stages: Annotated[str | None, typer.Option(help="Only these, as in 'prepare ids'; all by default.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every finished file again.")] = False,
) -> None:
    """Run every stage in order; what is finished stays. Ends with the table, and where report and bundle are."""
    from rarec.distributed.watchdog import watched

    opened = open_run(config, overrides)
    with watched(opened.world):
        opened.run(stages.split() if stages is not None else None, fresh=fresh, verify=verify)
    if stages is None and opened.world.is_main:
        del opened  # and with it the language model, of which the example loads another copy
        show_results(open_run(config, overrides))


@app.command(rich_help_panel="All at once")
def bench(
    config: Config,
    overrides: Overrides = None,
    variant: Annotated[str | None, typer.Option(help="Which variant; by default the main one.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to measure.", min=1)] = 10,
) -> None:
    """Say where the time of a training step goes, and what to change. Needs shards; trains and writes nothing."""
    from rarec.distributed.watchdog import watched

    opened = open_run(config, overrides)
    name = variant or opened.config.main_variant.name
    names = ", ".join(opened.config.variants)
    if name not in opened.config.variants:
        raise UserError(f"--variant {name}: train.variants has none of that name", f"give one of {names}")
    with watched(opened.world):
        trainer = import_module("rarec.stages.train").TrainStage(opened, name).untrained()
        profile = import_module("rarec.training.bench").bench(trainer, steps)
    if opened.world.is_main:
        for what, figure in profile.rows():
            print(f"{what:21} {figure}")
        for line in profile.advice(opened.config, opened.world.device.type):
            print(f"-> {line}")


@app.command(rich_help_panel="All at once")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep, YAML: a base, seeds, runs.")],
    overrides: Overrides = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the runs with their states; run nothing.")] = False,
    only: Annotated[str | None, typer.Option(help="A glob over the names of runs.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit what is not done, as arrays of jobs.")] = False,
    sbatch: Annotated[str, typer.Option(help="With --slurm: more options of sbatch, in one text.")] = "",
) -> None:
    """Run many variations of one configuration; what is done is skipped, what they share is made once."""
    if (sbatch and not slurm) or (listed and slurm):
        raise UserError("--sbatch goes with --slurm, and --list without it", "see rarec sweep --help")
    from rarec.cluster.definition import load_sweep
    from rarec.cluster.local import list_states, run_locally
    from rarec.cluster.slurm import submit

    whole = load_sweep(file, overrides or [])
    runs = whole.matching(only)
    if listed:
        print("\n".join(list_states(whole, runs)))
    elif slurm:
        submit(whole, runs, sbatch, say)
    else:
        with console.status("") as status:
            failed = run_locally(whole, runs, say, lambda line: status.update(Text(line)))
        for line in failed:
            say(f"failed: {line}")
        if failed:
            raise typer.Exit(1)


for _command_of_a_bundle in (recommend, serve, clicks, realign):
    app.command(rich_help_panel=OF_A_BUNDLE)(_command_of_a_bundle)
app.add_typer(items, name="items", rich_help_panel=OF_A_BUNDLE)


app.command(rich_help_panel="Before")(vectors)


@app.command(rich_help_panel="Before")
def doctor() -> None:
    """Say what this machine can run: devices, engines, compilers, models, and what is missing."""
    from rarec.planning.doctor import checks, doctor_table

    Console().print(doctor_table(checks()))


def show_results(run: "Run") -> None:
    """Print the table of variants, where everything is, the best variant, and recommendations by the bundle."""
    from rarec.evaluation.results import HEADLINE
    from rarec.report.run_files import closing_lines, read_run, terminal_table
    from rarec.stages.results import directories

    out = Console() if sys.stdout.isatty() else Console(width=110)
    files = read_run(directories(run), say=say)
    out.print(terminal_table(files, HEADLINE, out.width))
    print(f"report: {run.directory('report') / 'report.html'}")
    print(f"bundle: {run.directory('export')}")
    print(f"figures: {run.directory('evaluate') / 'metrics.json'}")
    for line in closing_lines(files, run.config):
        out.print(line)
    if run.world.size == 1:  # a model that needs several ranks is not loaded by one
        for line in _example(run):
            out.print(line, soft_wrap=True)


def _example(run: "Run") -> Iterator[str]:
    """Yield lines that show what the bundle of a run recommends to a user, and the command for more."""
    from rarec.bundle.bundle import Bundle
    from rarec.bundle.recommender import Recommender

    bundle = Bundle.open(run.directory("export"), None)  # the run that made it has imported its parts already
    llm = str(run.converted_llm) if run.converted_llm.is_dir() else None
    recommender = Recommender(bundle, llm=llm, device=run.world.device.type)
    rows = run.dataset.sequence(0)[-SHOWN:].tolist()
    history = run.dataset.item_ids.take(rows).to_pylist()
    yield f"After {'; '.join(in_one_line(run.dataset.titles[row]) for row in rows)}:"
    for best in recommender.recommend([history], SHOWN)[0]:
        yield f"  {in_one_line(str(best.item))}  {in_one_line(best.title)}"
    where = shlex.quote(str(bundle.directory))
    ids = shlex.quote(",".join(map(str, history)))
    yield f"More: rarec recommend {where} --history {ids}, or in a browser: rarec serve {where}"


def _print_versions(wanted: bool) -> None:
    if wanted:
        from rarec.planning.doctor import versions

        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_versions, help="Versions of rarec and its stack."),
    ] = False,
) -> None: ...


def command() -> None:
    """Run the command that the arguments name; what is wrong with them is a `UserError`."""
    if _COMPLETE in os.environ:  # the shell asks for the next word
        app(prog_name=_NAME)
    group = typer.main.get_command(app)
    arguments = sys.argv[1:] or ["--help"]
    if arguments[:2] == ["report", "clicks"]:  # another name of `rarec clicks`
        del arguments[0]
    try:  # not `app()`, which ends Ctrl-C and broken pipes by itself, in silence
        with group.make_context(_NAME, arguments) as context:
            group.invoke(context)
    except typer.Exit as ended:
        sys.exit(ended.exit_code if sys.argv[1:] else EXIT_CODE)
    except _UsageError as error:
        problem = " ".join(error.format_message().split("\n"))
        where = error.ctx.command_path if error.ctx else _NAME
        raise UserError(problem, f"see {where} --help", shared=True) from None
