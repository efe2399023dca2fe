"""What the commands `rarec recommend` and `rarec items` do with a bundle."""

import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rarec.bundle.batch import recommend_all
from rarec.bundle.bundle import CATALOGUE, ITEMS, LOG, Bundle, Catalogue, named_parts
from rarec.bundle.histories import open_log
from rarec.bundle.items import NewItems, add_items, read_items, remove_items
from rarec.bundle.recommended import Id, Recommended
from rarec.bundle.recommender import Recommender
from rarec.bundle.versions import next_version
from rarec.console.inert import in_one_line
from rarec.data.engines.table_files import find_files, hash_files
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.imports import read_vectors

Float32 = npt.NDArray[np.float32]


def print_for_history(recommender: Recommender, history: str, k: int, say: Callable[[str], None]) -> None:
    """Print the best new items after a history: ids of items with commas between them, oldest first."""
    items = [item.strip() for item in history.split(",") if item.strip()]
    found = recommender.recommend([items], k)
    if found.unknown[0]:
        say(f"{found.unknown[0]} of {len(items)} items are not in the catalogue: passed over")
    _print(found[0])


def example(bundle: Path, history: Sequence[Id], k: int, llm: str | None, device: str) -> list[str]:
    """Return lines that show what a bundle recommends after a history, and the command for more.

    Parts of the user's own were imported by the run already.
    """
    opened = Bundle.open(bundle, named_parts(bundle))
    recommender = Recommender(opened, llm=llm, device=device)
    titles = dict(zip(recommender.items, opened.catalogue.titles, strict=True))
    bought = "; ".join(in_one_line(titles[item]) for item in history)
    best = recommender.recommend([history], k)[0]
    where = shlex.quote(str(bundle))
    more = f"rarec recommend {where} --history {shlex.quote(','.join(map(str, history)))}"
    return [
        f"After {bought}:",
        *(f"  {in_one_line(str(one.item))}  {in_one_line(one.title)}" for one in best),
        f"More: {more}, or in a browser: rarec serve {where}",
    ]


def print_for_user(recommender: Recommender, log: str, columns: str | None, user: str, k: int) -> None:
    """Print the best new items for one user of a log."""
    prepare = recommender.bundle.tables(log=log, columns=columns_of(columns, LOG))
    with _columns_by_option(), open_log(prepare, recommender.bundle.directory / ITEMS, user) as histories:
        one = next(iter(histories), None)
    _print(recommender.recommend_to([one.rows if one else np.empty(0, np.int64)], k)[0])


def write_for_all(
    recommender: Recommender, log: str, columns: str | None, out: Path, k: int, world: World = SINGLE
) -> int:
    """Write the best new items for every user of a log; return the number of rows."""
    given = columns_of(columns, LOG)
    prepare = recommender.bundle.tables(log=log, columns=given)
    made_from = {"log": hash_files(find_files(log, "--log")), "columns": str(sorted(given.items()))}
    with _columns_by_option(), open_log(prepare, recommender.bundle.directory / ITEMS) as histories:
        return recommend_all(recommender, histories, out, k, made_from, world)


def add_items_of(
    recommender: Recommender,
    table: str,
    columns: str | None,
    vectors: Sequence[str],
    out: Path | None,
    say: Callable[[str], None],
) -> Path:
    """Add the items of a table; return the folder of the new version."""
    bundle = recommender.bundle
    with _columns_by_option():
        new = read_items(bundle.tables(items=table, columns=columns_of(columns, CATALOGUE)), say)
    given = dict(_vectors_of(pair, new) for pair in vectors)
    directory = out or next_version(bundle.directory)
    add_items(recommender.parts, NewItems(new, given), directory)
    say(f"{directory}: {_items(len(new.titles))} added; {bundle.directory} is as it was")
    return directory


def remove_items_of(
    bundle: Path, ids: Sequence[str], out: Path | None, trusted: Collection[str], say: Callable[[str], None]
) -> Path:
    """Remove items; return the folder of the new version."""
    directory = out or next_version(bundle)
    remove_items(Bundle.open(bundle, trusted), ids, directory)
    say(f"{directory}: {_items(len(set(ids)))} removed; {bundle} is as it was")
    return directory


def _vectors_of(pair: str, new: Catalogue) -> tuple[str, Float32]:
    """Return the name of an ID model and the new items' vectors by it, as `NAME=FILE` gives them."""
    name, equals, path = pair.partition("=")
    if not equals:
        raise UserError(f"--vectors {pair}", "write NAME=FILE, with the name of an ID model and a Parquet file")
    with tempfile.TemporaryDirectory(prefix="rarec-") as scratch:
        file = Path(scratch, "vectors.npy")
        given = read_vectors(path, None, "--vectors", "--vectors")
        given.write_aligned(file, new.ids, "item", "leave those items out", gaps=True)
        return name, np.load(file, allow_pickle=False)


def columns_of(given: str | None, roles: Sequence[str]) -> dict[str, str]:
    """Return the columns that `user=customer,item=sku` names.

    Raises:
        UserError: it is not of that form.
    """
    pairs = [pair.partition("=") for pair in given.split(",")] if given else []
    for role, equals, name in pairs:
        if role.strip() not in roles or not equals or not name:
            raise UserError(f"--columns: {role}{equals}{name}", f"write ROLE=COLUMN, with {', '.join(roles)} as roles")
    return {role.strip(): name.strip() for role, _, name in pairs}


@contextmanager
def _columns_by_option() -> Iterator[None]:
    """Name the option `--columns` in messages, where the configuration of a run has fields."""
    roles = "|".join((*LOG, *CATALOGUE))
    try:
        yield
    except UserError as error:
        texts = (error.problem, error.remedy)
        problem, remedy = (re.sub(rf"prepare\.\w+\.({roles})\b", r"--columns \1", text) for text in texts)
        raise UserError(problem.splitlines(), remedy) from None


def _items(count: int) -> str:
    return f"{count:,} item{'s' * (count != 1)}"


def _print(items: list[Recommended]) -> None:
    for one in items:
        print(f"{in_one_line(str(one.item))}\t{in_one_line(one.title)}\t{one.score:.4f}")
