"""Forms of a bundle for other engines, one class a target: `rarec export BUNDLE --to NAME`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rarec.config.registry import KINDS, find
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, write_manifest
from rarec.storage.directories import new_directory

if TYPE_CHECKING:
    from rarec.bundle.parts import Parts
    from rarec.bundle.recommender import Recommender

KIND = "served"
"""Of the manifest of a folder that holds targets."""
CATALOGUE, TABLES, ORDER = "catalogue.parquet", "parts.npz", "order.npz"
"""Files of `--to onnx`: the items; of each part `NAME/vectors` (N, Z) and `NAME/lacking` (N,); a learned order."""
ITEM, TOKENIZER = "item.onnx", "tokenizer.json"
AGAIN = "write it again: rarec export BUNDLE --to onnx --to faiss"
"""Remedy for a folder that a service or a client by ONNX Runtime cannot use."""
BUILT_IN = tuple(KINDS["targets"].built_in)
"""Names of the targets that come with rarec, in the order in which they are written."""
DISTRIBUTIONS = {"faiss": "faiss-cpu"}
"""Names by which packages are installed, where they are imported by another."""


class Target(ABC):
    """A form of a bundle. A subclass is a dataclass whose fields are its options: `index` is `--index`.

    Attributes:
        needs: names of targets that are written before it, into the same folder.
        packages: names by which it imports what `rarec[serving]` installs.
        alone: whether its folder holds no other target that is named.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False

    @abstractmethod
    def write(self, parts: "Parts", directory: Path) -> dict[str, Any]:
        """Write the files, and return what was measured, for the manifest.

        Args:
            parts: of the bundle.
            directory: to write to.

        Raises:
            UserError: the bundle has no such form, or the form differs from the bundle.
        """

    def publish(self, directory: Path) -> str:
        """Do what follows when the folder is whole; return a line for the user, "" for none."""
        return ""


def write_targets(
    recommender: "Recommender", names: Sequence[str], directory: Path, say: Callable[[str], None], **options: object
) -> None:
    """Write forms of a bundle into one folder, each checked against the bundle.

    Args:
        recommender: over the bundle; its model becomes float32 with `onnx` and `vllm`.
        names: of the targets; `faiss` and `onnx` together come with a client that needs neither torch nor rarec.
        directory: to write to.
        say: print one line to the user.
        **options: of the targets that are named.

    Raises:
        UserError: a target or an option is unknown, or not possible for this bundle; the folder is there already.
    """
    targets = _targets(names, options)
    bundle = recommender.bundle
    figures = dict[str, Any]()
    with new_directory(directory, replace=False) as temporary:
        for target in targets:
            figures |= target.write(recommender.parts, temporary)
        if not (temporary / MANIFEST).exists():  # a copy of the bundle has its own
            settings = {"formats": sorted(names), "row": bundle.facts["row"]}
            made_from = {"bundle": bundle.manifest["hash"]}
            write_manifest(temporary, KIND, settings=settings, made_from=made_from, **figures)
    lines = [f"{name}: {value}" for name, value in figures.items()]
    for line in filter(None, (*lines, *(target.publish(directory) for target in targets))):
        say(line)


def _targets(names: Iterable[str], options: Mapping[str, object]) -> list[Target]:
    """Return the targets that are named, after those that they need, in the order in which they are written."""
    named = {name: _class(name) for name in names}
    alone = [name for name, target in named.items() if target.alone]
    if alone and len(named) > 1:
        raise UserError(f"--to {alone[0]} makes a folder of its own", "give one --to, and the others in other commands")
    for option in options:
        takers = [name for name in BUILT_IN if option in _options(_class(name))]
        if not any(option in _options(target) for target in named.values()):
            problem = f"--{option} does nothing with --to {' --to '.join(named)}"
            raise UserError(problem, f"leave it out, or give it with --to {' or '.join(takers)}")
    classes = {name: _class(name) for target in named.values() for name in target.needs} | named
    for name, target in classes.items():
        absent = list(filter(_cannot_import, target.packages))
        if absent:
            names = ", ".join(DISTRIBUTIONS.get(package, package) for package in absent)
            raise UserError(f"--to {name} needs {names}", "pip install 'rarec[serving]'")
    own = {name: {option: options[option] for option in _options(named[name]) if option in options} for name in named}
    in_order = sorted(classes, key=lambda name: (*BUILT_IN, name).index(name))
    return [classes[name](**own.get(name, {})) for name in in_order]


def _cannot_import(package: str) -> bool:
    """Return whether a package is not there, or lacks what it needs itself."""
    try:
        import_module(package)
    except ImportError:
        return True
    return False


def raise_if_far(figure: str, difference: float, limit: float, remedy: str = "report it: this is a bug") -> None:
    """Refuse a form that differs from the bundle by more than rounding."""
    if difference > limit:
        raise UserError(f"{figure} is {difference:.1e}: the form differs from the bundle", remedy)


def _class(name: str) -> type[Target]:
    try:
        target: type[Target] = find("targets", name)
    except ValueError as error:
        raise UserError(f"--to {name}: {error}", f"choose from {', '.join(BUILT_IN)}") from None
    return target


def _options(target: type[Target]) -> list[str]:
    return [field.name for field in fields(target)]  # type: ignore[arg-type]  # every target is a dataclass
