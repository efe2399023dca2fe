"""Find the files that are shipped beside the code: `configs/` and `launch/`.

In a checkout they are in the repository's root, in an installed wheel in `rarec/data_files/`.
`python -m rarec.config.shipped` prints the directory, for shell scripts.
"""

from pathlib import Path

from rarec.errors import UserError


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
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    print(shipped_files())
