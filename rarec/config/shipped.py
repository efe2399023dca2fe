"""Find files that are installed with code: `configs/` and `launch/` beside rarec, and `package:NAME/FILE` anywhere.

In a checkout rarec's are in the repository's root, in an installed wheel in `rarec/data_files/`.
`python -m rarec.config.shipped` prints that directory, for shell scripts.
"""

import importlib.util
from pathlib import Path

from rarec.errors import UserError

PACKAGE = "package:"


def shipped_files() -> Path:
    """Return the directory that contains `configs/` and `launch/`, as an absolute path.

    Raises:
        UserError: neither a checkout nor an installed wheel has them.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package.parent, package / "data_files"):
        if (directory / "configs" / "runs").is_dir():
            return directory
    problem = f"{package} has no data_files/configs, and there is no configs/ beside it"
    raise UserError(problem, "reinstall: pip install --force-reinstall --no-deps rarec")


def shipped_file(name: str) -> Path:
    """Return the path of a shipped file, such as `configs/accelerate/ddp.yaml`; relative if it is below this directory.

    Raises:
        UserError: the shipped files are missing.
    """
    path = shipped_files() / name
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path


def resolve_path(path: str) -> str:
    """Turn `package:NAME/FILE` into the path of a file inside an installed package; other paths stay as they are.

    The package is found, not imported: none of its code runs.

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    if not path.startswith(PACKAGE):
        return path
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install --no-deps {name.replace('_', '-')}"
        raise UserError(f"{path}: the Python package {name!r} is not installed", remedy)
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.exists():
        raise UserError(f"{path}: the installed package {name!r} holds no {inside!r}", f"look in {file.parent}")
    return str(file)


if __name__ == "__main__":
    print(shipped_files())
