"""Harm runs in thousands of ways, and check that nothing is lost, nothing damaged passes, and every refusal helps.

    python tools/check_harm.py [--minutes N | --examples N] [--seed S] [--only CLASS] [--follow] [--quick] [--keep DIR]

Classes of harm: files of the user's in rarec's way (trees), damaged files of rarec's (bytes), fields of the
configuration (values), logs and language models (inputs), bundles and what their commands are given (bundles), and what
surrounds the command (surroundings). Each example copies a tiny run, harms the copy, runs one command and judges the
end (harm_oracle.py). An example is determined by its class and its seed: `--only CLASS --seed S --examples 1` repeats
it, and `--keep DIR` keeps what it leaves. With `--follow` the remedies of refusals are carried out, and the command
must then succeed. With `--quick`, as in tests/test_harm.py, no command builds more than one stage.

Standard error lists each failure as it is found; standard output is a table. The exit code is 1 if there is any.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from harm_bundles import harm_bundle
from harm_files import damage, plant
from harm_inputs import harm_input
from harm_oracle import Harm, Judge, Tree, snapshot, users_files
from harm_process import Outcome, Server
from harm_remedies import Patient, Useless
from harm_surroundings import surround
from harm_values import set_value
from harm_world import World, next_stage

CLASSES: dict[str, Callable[[random.Random, World, Path], Harm]] = {
    "trees": plant,
    "bytes": damage,
    "values": set_value,
    "inputs": harm_input,
    "bundles": harm_bundle,
    "surroundings": surround,
}
SLOW = ("run", "train", "report")
"""Commands that take more than half a second."""
FOLLOWED = ("trees", "bytes")
"""Classes whose remedies lead to the undisturbed results."""


@dataclass(frozen=True)
class Verdict:
    """The end of one example.

    Attributes:
        harm: the harm in one line.
        line: the command.
        code: its exit code.
        faults: what is wrong; empty if all is as it must be.
        stderr: what the command said.
    """

    harm: str
    line: str
    code: int | None
    faults: list[str]
    stderr: str

    def __str__(self) -> str:
        return f"{self.harm}; {self.line}: exit code {self.code}; " + "; ".join(self.faults)


class Examples:
    """Makes examples, one at a time.

    Args:
        scratch: directory for the world and the copies.
        keep: whether the last copy stays.
    """

    def __init__(self, scratch: Path, keep: bool = False) -> None:
        self.server = Server()
        self.world = World(scratch / "world", self.server)
        self._place, self._keep = scratch / "copy", keep

    def run(self, kind: str, seed: int, follow: bool = False, quick: bool = False) -> Verdict:
        """Make the example of a class and a seed, and judge it.

        Args:
            kind: a class.
            seed: any number.
            follow: carry out remedies.
            quick: build one stage at most.
        """
        self._clear()
        harm = CLASSES[kind](random.Random(f"{kind} {seed}"), self.world, self._place)
        try:
            harm = self._quicker(harm) if quick else harm
            return self._judged(self._at_home(harm), follow and kind in FOLLOWED)
        finally:
            harm.release()
            if not self._keep:
                self._clear()

    def close(self) -> None:
        """End the process that runs commands."""
        self.server.close()

    def _clear(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)

    def _quicker(self, harm: Harm) -> Harm:
        """Return the same harm before a command that builds one stage, and none of the slow ones anew."""
        stage, *rest = harm.command.words
        state = self.world.copied
        if stage == "run" and state != "finished":
            stage = state.split("-")[-1] if state.startswith("half") else next_stage(state)
        if stage in SLOW:
            rest = [word for word in rest if word != "--fresh"]
        return replace(harm, command=replace(harm.command, words=[stage, *rest]))

    def _at_home(self, harm: Harm) -> Harm:
        """Give the command a home and a directory for temporary files of its own."""
        for name in ("home", "tmp"):
            (self._place / name).mkdir(exist_ok=True)
        own = {"HOME": str(self._place / "home"), "TMPDIR": str(self._place / "tmp")}
        return replace(harm, command=replace(harm.command, environment={**own, **harm.command.environment}))

    def _judged(self, harm: Harm, follow: bool) -> Verdict:
        original = snapshot(self.world.state(self.world.copied))
        users = users_files(snapshot(self._place), original, harm.planted)
        outcome, faults = self._attempt(harm, original, users)
        if not faults and outcome.code and harm.again:
            harm.restore()
            now = snapshot(self._place)  # what is restored may have another mode
            users = {path: now.get(path, entry) for path, entry in users.items()}
            again, more = self._attempt(replace(harm.then(harm.command.words), names=()), original, users)
            said = f" ({again.stderr.strip().splitlines()[-1][:200]})" if again.code and again.stderr.strip() else ""
            faults = [f"the same command afterwards{said}: {one}" for one in more]
            if again.code and not more:
                faults = [f"the same command afterwards: exit code {again.code}{said}"]
        elif not faults and outcome.code == 2 and follow:
            faults = self._follow(harm, outcome, original)
        return Verdict(harm.what, harm.line, outcome.code, faults, outcome.stderr)

    def _attempt(self, harm: Harm, original: Tree, users: Tree) -> tuple[Outcome, list[str]]:
        """Run the command of a harm, and return what is wrong with its end."""
        before = snapshot(self._place)
        outcome = self.server.run(harm.command)
        judge = Judge(self.world, self._place, harm, original, users, before, snapshot(self._place))
        return outcome, judge.judge(outcome)

    def _follow(self, harm: Harm, outcome: Outcome, original: Tree) -> list[str]:
        """Carry out remedies until the command succeeds; return what is wrong."""
        command = harm.then(harm.command.words).command
        try:
            recovered = Patient(self.server, self._place, command).recover(outcome.stderr)
        except Useless as useless:
            return [str(useless)]
        if recovered is None or recovered[1].command != command:
            return []
        now = snapshot(self._place)
        judge = Judge(self.world, self._place, harm, original, {}, now, now)
        judge.results()
        return [f"{'; '.join(recovered[0])}: {fault}" for fault in judge.faults]


def seeds_from(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield classes and seeds in turn, until the examples or the minutes are used up."""
    kinds = [arguments.only] if arguments.only else list(CLASSES)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    for number in count():
        if (end is None and number >= arguments.examples) or (end is not None and time.monotonic() > end):
            return
        yield kinds[number % len(kinds)], arguments.seed + number // len(kinds)


def print_counts(verdicts: Iterable[tuple[str, int | None, bool]]) -> None:
    """Print the table: examples of each class by their ends."""
    counts: dict[str, Counter[str]] = {}
    for kind, code, failed in verdicts:
        end = "FAILED" if failed else "unharmed" if code == 0 else "refused"
        counts.setdefault(kind, Counter()).update([end, "tried"])
    columns = ["tried", "unharmed", "refused", "FAILED"]
    print(f"{'class':14}" + "".join(f"{column:>10}" for column in columns))
    for kind, each in counts.items():
        print(f"{kind:14}" + "".join(f"{each[column]:>10}" for column in columns))


def main() -> None:
    """Make examples and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long; by default --examples says how many")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first example of each class")
    parser.add_argument("--only", choices=CLASSES)
    parser.add_argument("--follow", action="store_true", help="carry out remedies")
    parser.add_argument("--keep", type=Path, help="an empty directory for the world and the last copy, which stay")
    parser.add_argument("--quick", action="store_true", help="build one stage at most")
    arguments = parser.parse_args()
    scratch = arguments.keep or Path(tempfile.mkdtemp(prefix="rarec-harm-"))
    scratch.mkdir(exist_ok=True)
    examples, ends = Examples(scratch, keep=arguments.keep is not None), list[tuple[str, int | None, bool]]()
    try:
        for kind, seed in seeds_from(arguments):
            verdict = examples.run(kind, seed, arguments.follow, arguments.quick)
            ends.append((kind, verdict.code, bool(verdict.faults)))
            if verdict.faults:
                print(f"{kind} {seed}: {verdict}", file=sys.stderr, flush=True)
    finally:
        examples.close()
        if arguments.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
    print_counts(ends)
    sys.exit(any(failed for *_, failed in ends))


if __name__ == "__main__":
    main()
