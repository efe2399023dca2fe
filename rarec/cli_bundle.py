"""Commands of `rarec` that need a bundle and no run."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from rarec.entry import open_run, say, watched
from rarec.errors import UserError

BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that rarec export has written.", show_default=False)
]
LanguageModel = Annotated[
    str | None, typer.Option("--llm", help="The language model, if it is elsewhere than at the export.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Trust = Annotated[list[str] | None, typer.Option(help="A part of your own that it may import: package.module:Name.")]
NewFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the new version; BUNDLE-2, BUNDLE-3 and so on by default.")
]

items = typer.Typer(help="Add or remove items without training: a new version beside the bundle, which stays.")


def recommend(
    bundle: BundleFolder,
    history: Annotated[str | None, typer.Option(help="Ids of items, oldest first: sku-1,sku-7")] = None,
    user: Annotated[str | None, typer.Option(help="A user of --log.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every user of --log; needs --out.")] = False,
    log: Annotated[str | None, typer.Option(help="A log of interactions: CSV, Parquet, JSONL.")] = None,
    columns: Annotated[str | None, typer.Option(help="Of --log, where they differ: user=customer,item=sku")] = None,
    out: Annotated[Path | None, typer.Option(help="Write here, by its ending: .parquet, .csv or .jsonl.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of items.")] = 10,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Print the best new items for a history, or for users of a log, by a bundle; no run is needed."""
    asked = [name for name, given in (("--history", history), ("--user", user), ("--all", everyone)) if given]
    if len(asked) != 1 or (log is None) != (asked == ["--history"]) or (out is None) == everyone:
        remedy = "give --history ITEM,ITEM, or --user ID --log FILE, or --all --log FILE --out FILE"
        raise UserError("whom to recommend to is not clear", remedy)
    if everyone:
        _recommend_to_all(bundle, llm, device, trust, (log, columns, out, k))
        return
    serving, recommender = _serving("command"), _load(bundle, llm, device, trust)
    if history:
        serving.print_for_history(recommender, history, k, say)
    else:
        serving.print_for_user(recommender, log, columns, user, k)


def _recommend_to_all(
    bundle: Path, llm: str | None, device: str, trust: list[str] | None, arguments: tuple[Any, ...]
) -> None:
    """Recommend on all ranks that a launcher has started, which share the users."""
    world = import_module("rarec.training.accelerator").join_world(device, "--device", "--device cpu")
    with watched(world):
        recommender = world.run_on_all(lambda: _load(bundle, llm, str(world.device), trust))
        rows = _serving("command").write_for_all(recommender, *arguments, world)
    say(f"{arguments[2]}: {rows:,} rows")


def convert(
    bundle: Path,
    formats: Sequence[str],
    out: Path | None,
    index: str,
    int8: bool,
    push: str | None,
    llm: str | None,
    trust: list[str] | None,
) -> None:
    """Write a bundle in other forms; see `rarec export --to`."""
    if out is None:
        raise UserError("--to needs a folder to write to", "name it: --out DIR")
    recommender = _load(bundle, llm, "cpu", trust)
    _serving("formats.write").write_formats(recommender, formats, out, index=index, int8=int8, push=push, say=say)
    say(str(out))


@items.command("add")
def add(
    bundle: BundleFolder,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The new items: CSV, Parquet, JSONL.")],
    columns: Annotated[str | None, typer.Option(help="Where they differ: item=sku,title=name,text=brand")] = None,
    vectors: Annotated[list[str] | None, typer.Option(help="Vectors of an ID model, Parquet: NAME=FILE")] = None,
    out: NewFolder = None,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Add items by their text, and by an ID vector where there is one."""
    recommender = _load(bundle, llm, device, trust)
    _serving("command").add_items_of(recommender, table, columns, vectors or [], out, say)


@items.command("remove")
def remove(
    bundle: BundleFolder,
    ids: Annotated[list[str], typer.Argument(metavar="ITEM...", help="Ids of items.")],
    out: NewFolder = None,
    trust: Trust = None,
) -> None:
    """Remove items."""
    _serving("command").remove_items_of(bundle, ids, out, trust or [], say)


def realign(
    bundle: BundleFolder,
    config: Annotated[Path, typer.Argument(help="The run whose stage `ids` has trained the new ID models, YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value", show_default=False)] = None,
    least: Annotated[float, typer.Option(help="Refuse below this explained share of held-out vectors.")] = 0.5,
    out: NewFolder = None,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Take retrained ID models into a bundle without training: a new version beside the bundle, which stays."""
    run, recommender, serving = open_run(config, overrides), _load(bundle, llm, device, trust), _serving("realign")
    sources = {**run.sources, run.baseline.name: run.baseline}
    ids = list(run.dataset.item_ids)
    models = {name: serving.NewModel(source, ids) for name, source in sources.items()}
    directory = out or _serving("versions").next_version(bundle)
    for name, value in serving.realign(recommender.parts, models, directory, least).items():
        say(f"{name}: {value}")
    say(str(directory))


def _serving(module: str) -> Any:
    return import_module(f"rarec.bundle.{module}")


def _load(bundle: Path, llm: str | None, device: str, trust: list[str] | None) -> Any:
    return _serving("recommender").load(bundle, device=device, llm=llm, trusted=trust or [])
