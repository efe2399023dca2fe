"""Commands of `rarec` that need no run: those of a bundle, and one that makes vectors for a run."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from rarec.console.inert import in_one_line
from rarec.console.progress import say
from rarec.entry import open_run
from rarec.errors import UserError

if TYPE_CHECKING:
    from rarec.bundle.recommended import Recommended
    from rarec.bundle.recommender import Recommender

_BUNDLE = "Folder that rarec export has written."
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_BUNDLE, show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value", show_default=False)]
BundleOrNone = Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help=_BUNDLE, show_default=False)]
_LLM = "The language model, if it is elsewhere than at the export."
LanguageModel = Annotated[str | None, typer.Option("--llm", help=_LLM)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Trust = Annotated[list[str] | None, typer.Option(help="A part of your own that it may import: package.module:Name.")]
_OUT = "Folder of the new version; BUNDLE-2, BUNDLE-3 and so on by default."
NewFolder = Annotated[Path | None, typer.Option("--out", help=_OUT)]
OF_LOG, OF_ITEMS = ("user", "item", "time", "position"), ("item", "title", "text")
"""Roles that `--columns` takes, of a log and of a table of items."""

LOOPBACK = "127.0.0.1"

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
    allow: Annotated[str | None, typer.Option(help="The only items that may be returned: sku-1,sku-7")] = None,
    deny: Annotated[str | None, typer.Option(help="Items that may not be returned: sku-1,sku-7")] = None,
    where: Annotated[str | None, typer.Option(help='A condition on columns: "in_stock = true and price < 20"')] = None,
    diversify: Annotated[float, typer.Option(help="0 to 1: how much likeness within a list counts against it.")] = 0.0,
    fallback: Annotated[str, typer.Option(help="Fills lists: popularity, recent or none.")] = "popularity",
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Print the best new items for a history, or for users of a log, by a bundle; no run is needed."""
    chosen = [name for name, given in (("--history", history), ("--user", user), ("--all", everyone)) if given]
    if len(chosen) != 1 or (log is None) != (chosen == ["--history"]) or (out is None) == everyone:
        remedy = "give --history ITEM,ITEM, or --user ID --log FILE, or --all --log FILE --out FILE"
        raise UserError("whom to recommend to is not clear", remedy)
    options = {"allow": _ids(allow), "deny": _ids(deny), "where": where, "diversify": diversify, "fallback": fallback}
    rules: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if out is not None and log is not None:
        _recommend_to_all(lambda device: open_bundle(bundle, llm, device, trust), device, log, columns, out, k, rules)
        return
    recommender = open_bundle(bundle, llm, device, trust)
    _say_unknown(recommender, rules)
    if log is None:
        ids = _ids(history) or []
        best = recommender.recommend([ids], k, **rules)
        if best.unknown[0]:
            say(f"{best.unknown[0]} of {len(ids)} items are not in the catalogue: skipped")
        _print(best[0])
        return
    from rarec.bundle.users import open_log

    with _columns(columns, OF_LOG) as given, open_log(recommender.bundle, log, say, given, user) as (_, users):
        rows = [own for _, own in users]
    _print(recommender.recommend_to(rows, k, **rules)[0])


def _ids(given: str | None) -> list[str] | None:
    """Return the ids of an option; None if it is not given."""
    return None if given is None else [item.strip() for item in given.split(",") if item.strip()]


def _say_unknown(recommender: "Recommender", rules: Mapping[str, Any]) -> None:
    """Say which ids of the rules the catalogue lacks; refuse rules that are wrong before anything is read."""
    import numpy as np

    from rarec.bundle.recommended import Request

    (plan,) = recommender.rules.plans([Request((), 1, **rules)], [np.empty(0, np.int64)])
    if plan.unknown:
        say(f"--allow, --deny: not in the catalogue, skipped: {', '.join(map(str, plan.unknown))}")


def _recommend_to_all(
    load: Callable[[str], "Recommender"],
    device: str,
    log: str,
    columns: str | None,
    out: Path,
    k: int,
    rules: Mapping[str, Any],
) -> None:
    """Recommend on all ranks that a launcher has started, which share the users; `load` opens the bundle."""
    from rarec.bundle.users import recommend_all
    from rarec.distributed.watchdog import watched
    from rarec.training.accelerator import join_world

    world = join_world(device, "--device", "--device cpu")
    with watched(world), _columns(columns, OF_LOG) as given:
        recommender = world.run_on_all(lambda: load(str(world.device)))
        world.run_on_main(lambda: _say_unknown(recommender, rules))
        rows = recommend_all(recommender, log, out, k, say=say, columns=given, world=world, rules=rules)
    say(f"{out}: {rows:,} rows")


@contextmanager
def _columns(given: str | None, roles: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the columns that `user=customer,item=sku` names; messages name the option, where a run has fields.

    Raises:
        UserError: it is not of that form.
    """
    columns = _pairs("--columns", given.split(",") if given else [], "ROLE=COLUMN", roles)
    with fields_as_options({rf"prepare\.\w+\.({'|'.join(roles)})\b": r"--columns \1"}):
        yield columns


@contextmanager
def fields_as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name options in messages where a run has fields.

    Args:
        options: replacement by pattern.
    """
    try:
        yield
    except UserError as error:
        texts = [error.problem, error.remedy]
        for pattern, option in options.items():
            texts = [re.sub(pattern, option, text) for text in texts]
        raise UserError(texts[0].splitlines(), texts[1], shared=error.shared) from None


def _pairs(option: str, words: Iterable[str], form: str, names: Sequence[str] = ()) -> dict[str, str]:
    """Return what `name=value` words of an option say; the names are of `names`, or any."""
    pairs = [[part.strip() for part in word.partition("=")] for word in words]
    for name, equals, value in pairs:
        if not equals or not value or (names and name not in names):
            remedy = f"write {form}" + (f", with {', '.join(names)} for the first" if names else "")
            raise UserError(f"{option}: {name}{equals}{value}", remedy)
    return {name: value for name, _, value in pairs}


def _print(best: "Iterable[Recommended]") -> None:
    for item in best:
        print(f"{in_one_line(str(item.item))}\t{in_one_line(item.title)}\t{item.score:.4f}")


def serve(
    bundle: BundleOrNone = None,
    settings: Annotated[Path | None, typer.Option(help="Settings instead: several bundles, limits, tokens.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; this machine alone reaches the default.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes, each with the models.")] = 1,
    backend: Annotated[str | None, typer.Option(help="torch, or onnx for a folder of --to onnx --to faiss.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of bearer tokens, one a line.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which a proxy reaches it. Repeatable.")
    ] = None,
    drain: Annotated[int, typer.Option(min=0, max=3600, help="Seconds to answer what was asked, at the end.")] = 30,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Serve a bundle over HTTP, with a page at /. Stop it with Ctrl-C."""
    try:
        from rarec.serve import server
        from rarec.serve import settings as reading
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", "pip install 'rarec[serve]'") from None
    options = {"backend": backend, "llm": llm, "trusted": trust, "tokens": tokens and str(tokens.absolute())}
    options["hosts"] = allow_host
    given: dict[str, Any] = {name: value for name, value in options.items() if value}
    if bundle is not None and settings is None:
        served = reading.settings_of(bundle, device=device, **given)
    elif settings is not None and bundle is None:
        if given or device != "auto":
            raise UserError("--settings says all but where to listen", "write the other options into that file")
        served = reading.read_settings(settings)
    else:
        raise UserError("what to serve is not clear", "give a BUNDLE, or --settings serve.yaml")
    server.serve(served, settings, host, port, workers, drain)


def clicks(
    impressions: Annotated[Path, typer.Argument(help="Folder of `impressions.path` of a service.")],
    table: Annotated[str, typer.Argument(metavar="CLICKS", help="Clicks on what it has shown: CSV, Parquet, JSONL.")],
    columns: Annotated[str | None, typer.Option(help="Of CLICKS, where they differ: id=answer,item=sku")] = None,
) -> None:
    """Print the click rates of the bundles of a service, and of the places in its lists."""
    from rarec.report.clicks import ROLES, count_clicks, lines

    given = _pairs("--columns", columns.split(",") if columns else [], "ROLE=COLUMN", ROLES)
    for line in lines(count_clicks(impressions, table, given)):
        print(line)


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
    from rarec.bundle.items import add_items

    files = _pairs("--vectors", vectors or [], "NAME=FILE: an ID model, and a Parquet file of its vectors")
    parts = open_bundle(bundle, llm, device, trust).parts
    with _columns(columns, OF_ITEMS) as given:
        directory, count = add_items(parts, table, out, say, columns=given, vectors=files)
    say(f"{directory}: {count:,} item{'s' * (count != 1)} added; {bundle} is as it was")


@items.command("update")
def update(
    bundle: BundleFolder,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Ids and columns: CSV, Parquet, JSONL.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[COLUMN]...", help="Its columns to take.")] = None,
    date: Annotated[str | None, typer.Option(help="Its column of dates, for the fallback `recent`.")] = None,
    columns: Annotated[str | None, typer.Option(help="Where it differs: item=sku")] = None,
    out: NewFolder = None,
    trust: Trust = None,
) -> None:
    """Set columns that conditions of requests may name, such as what is in stock."""
    from rarec.bundle.bundle import Bundle
    from rarec.bundle.items import update_items

    if not names and not date:
        raise UserError("no column is named", f"write rarec items update {bundle} {table} COLUMN")
    opened = Bundle.open(bundle, trust or [])
    with _columns(columns, ("item",)) as given:
        directory, count = update_items(opened, table, names or [], out, say, columns=given, date=date)
    say(f"{directory}: {count:,} item{'s' * (count != 1)} updated; {bundle} is as it was")


@items.command("remove")
def remove(
    bundle: BundleFolder,
    ids: Annotated[list[str], typer.Argument(metavar="ITEM...", help="Ids of items.")],
    out: NewFolder = None,
    trust: Trust = None,
) -> None:
    """Remove items."""
    from rarec.bundle.bundle import Bundle
    from rarec.bundle.items import remove_items

    directory, count = remove_items(Bundle.open(bundle, trust or []), ids, out)
    say(f"{directory}: {count:,} item{'s' * (count != 1)} removed; {bundle} is as it was")


def realign(
    bundle: BundleFolder,
    config: Annotated[Path, typer.Argument(help="The run whose stage `ids` has trained the new ID models, YAML.")],
    overrides: Overrides = None,
    least: Annotated[float, typer.Option(help="Refuse below this explained share of held-out vectors.")] = 0.5,
    out: NewFolder = None,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Take retrained ID models into a bundle without training: a new version beside the bundle, which stays."""
    from rarec.bundle.realign import realign as write_realigned

    run = open_run(config, overrides)
    parts = open_bundle(bundle, llm, device, trust).parts
    directory, figures = write_realigned(parts, run.sources, list(run.dataset.item_ids), out, least)
    for name, value in figures.items():
        say(f"{name}: {value}")
    say(str(directory))


def vectors(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of pictures, ITEM.jpg; or a table of items.")],
    model: Annotated[str, typer.Option(help="Folder or hub name of a model that sees pictures, or reads texts.")],
    out: Annotated[Path, typer.Option(help="File to write: NAME.npy, and NAME.ids.txt beside it.")],
    texts: Annotated[str, typer.Option(help="Of a table, the columns to read: title,brand")] = "",
    item: Annotated[str, typer.Option(help="Of a table, the column of ids.")] = "item",
    device: Device = "auto",
) -> None:
    """Make item vectors of pictures or texts, for the section `sources`; the same command resumes."""
    from rarec.training.accelerator import join_world
    from rarec.vectors import encoders, make

    columns = [column.strip() for column in texts.split(",")]
    with fields_as_options(_OPTIONS):
        content = make.read_texts(source, item, columns, say) if texts else make.find_pictures(Path(source))
        load = encoders.load_text_encoder if texts else encoders.load_picture_encoder
        on = join_world(device, "--device", "--device cpu").device
        ids = make.make_vectors(content, lambda: load(model, on), out)
    name = re.sub("[^A-Za-z0-9_-]", "_", out.stem)[:40]
    section = {"items": str(out), "item_ids": str(ids), "missing": "fallback"}
    print(
        yaml.safe_dump({"sources": {name: section}}, sort_keys=False) + f"# its slots in prompt.item: {{soft:{name}}}"
    )


_OPTIONS = {
    r"prepare\.items\.item": "--item",
    r"prepare\.items\.\w+": "--texts",
    r"(, or |^)set llm\..*": r"\1take another model",
    r"llm\.path": "--model",
}
"""Options of `rarec vectors` by fields of a run."""


def open_bundle(bundle: Path, llm: str | None, device: str, trust: list[str] | None) -> "Recommender":
    """Return the recommender of a bundle, as the options of a command say."""
    from rarec.bundle.recommender import load

    return load(bundle, device=device, llm=llm, trusted=trust or [])
