"""What answers a service's requests: a bundle's model in PyTorch or in ONNX Runtime, and the thread that runs it.

Requests that wait together share a pass of the model. One thread runs the model; no two calls of it overlap.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rarec.bundle.base import BaseRecommender
from rarec.bundle.recommended import History, Id, Recommended, Request
from rarec.errors import UserError
from rarec.serve.guard import event
from rarec.serve.settings import ServeSettings
from rarec.storage.artefacts import Manifest, check_files, read_manifest

LONGEST = 20
"""Items of the longest history that an engine answers before it serves."""
AGAIN = "write it again: rarec export BUNDLE --to onnx --to faiss"


class Answer(NamedTuple):
    """What one user gets: items, best first; how many ids of the history are unknown, and which ids of the rules."""

    items: list[Recommended]
    unknown: int
    unknown_in_rules: Sequence[Id] = ()


class Busy(Exception):
    """As many users wait as may wait."""


class Closed(Exception):
    """Another bundle has taken the place of this one."""


class Engine:
    """A bundle that answers.

    Args:
        recommender: over it.
        version: hash of its manifest.

    Attributes:
        row: name of the row that is served.
        ids: of the catalogue.
        titles: of the catalogue.
    """

    def __init__(self, recommender: BaseRecommender, version: str) -> None:
        self.recommender, self.version = recommender, version
        self.row, self.ids, self.titles = recommender.row, recommender.items, recommender.catalogue.titles

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Recommend. Raises `UserError` where a request's rules are wrong."""
        answers = self.recommender.answer(requests)
        return list(map(Answer, answers.items, answers.unknown, answers.unknown_in_rules))

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """Return query vectors, (B, F) or (B, K, F), as lists."""
        vectors: list[Any] = self.recommender.query_vectors(histories).tolist()
        return vectors


def load_engine(settings: ServeSettings, path: Path) -> Engine:
    """Open the engine of a bundle, say what it cannot answer, and warm it up.

    Raises:
        UserError: it is missing or damaged.
    """
    engine = (_load_onnx if settings.backend == "onnx" else _load_torch)(path, settings)
    for what, error in engine.recommender.missing.items():
        event("warning", f"{path}: {what} is not offered: {error.problem} -> {error.remedy}")
    lengths = [1 + user % LONGEST for user in range(settings.warm_up)]
    engine.answer([Request(engine.ids[:length]) for length in lengths])  # so that no request waits for memory
    return engine


def _load_torch(path: Path, settings: ServeSettings) -> Engine:
    """Open a bundle whose model runs in PyTorch."""
    import torch

    from rarec.bundle.bundle import Bundle
    from rarec.bundle.recommender import Recommender

    if settings.threads:
        torch.set_num_threads(settings.threads)
    bundle = Bundle.open(path, settings.trusted)
    recommender = Recommender(bundle, device=settings.device, llm=settings.llm, batch_size=settings.batch_size)
    if bundle.facts["model"]:
        model = recommender.parts.encoder.model
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # a mapped file that is cut short on the disk would end the process
    return Engine(recommender, str(bundle.manifest["hash"]))


def _load_onnx(path: Path, settings: ServeSettings) -> Engine:
    """Open a folder whose model runs in ONNX Runtime: neither torch nor the language model's folder is needed."""
    manifest = check_served(path)
    try:
        from rarec.export.onnx_recommender import OnnxRecommender
    except ModuleNotFoundError as error:
        raise UserError(f"backend onnx: {error.name} is not installed", "pip install 'rarec[serving]'") from None
    row = str(manifest["settings"]["row"])
    recommender = OnnxRecommender(path, row, settings.threads or 0, settings.batch_size)
    return Engine(recommender, str(manifest["hash"]))


def check_served(folder: Path) -> Manifest:
    """Check the files of a folder; return its manifest.

    Raises:
        UserError: it is missing, damaged, or lacks a form.
    """
    try:
        manifest = read_manifest(folder, "served")
    except UserError as error:
        raise UserError(error.problem, AGAIN) from None
    check_files(folder, manifest, AGAIN)
    if not {"onnx", "faiss"} <= set(manifest["settings"]["formats"]):
        raise UserError(f"{folder} lacks ONNX or faiss", AGAIN)
    return manifest


# ---- the thread that runs an engine


@dataclass
class _Job:
    """What one caller waits for: answers to requests, or the result of a call that runs alone; for how many users."""

    requests: Sequence[Request]
    call: Callable[[], Any] | None
    users: int
    future: "Future[Any]" = field(default_factory=Future)


class Batcher:
    """Runs an engine in a thread of its own.

    Args:
        engine: of a bundle.
        most: users of a pass of the model.
        window: seconds that a request waits for others.
        limit: users who may wait.
        observe: is told the number of users of each pass.
    """

    def __init__(
        self, engine: Engine, most: int, window: float, limit: int, observe: Callable[[int], None] = lambda users: None
    ) -> None:
        self.engine, self._most, self._window, self._limit, self._observe = engine, most, window, limit, observe
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""
        return sum(job.users for job in list(self._jobs) if not job.future.cancelled())

    @property
    def alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread.is_alive()

    def answer(self, requests: Sequence[Request]) -> "Future[list[Answer]]":
        """Return the future answers to requests, which may share a pass with those of others.

        Raises:
            Busy: too many wait.
            Closed: it serves no more.
        """
        return self._submit(_Job(requests, None, len(requests)))

    def call(self, function: Callable[[], Any], users: int = 1) -> "Future[Any]":
        """Return the future result of a call of the engine for a number of users. Raises as `answer` does."""
        return self._submit(_Job((), function, users))

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _submit(self, job: _Job) -> "Future[Any]":
        with self._changed:
            if self._closed:
                raise Closed
            waiting = self.waiting
            if waiting and waiting + job.users > self._limit:
                raise Busy
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                _finish(jobs, self.engine)
                self._observe(sum(job.users for job in jobs))

    def _next(self) -> list[_Job] | None:
        """Return the jobs of the next pass; None at the end."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            if self._jobs[0].call:
                return [self._jobs.popleft()]
            end = time.monotonic() + self._window
            while self.waiting < self._most and (left := end - time.monotonic()) > 0 and not self._closed:
                self._changed.wait(left)
            jobs = [self._jobs.popleft()]
            users = jobs[0].users
            while self._jobs and not self._jobs[0].call and users + self._jobs[0].users <= self._most:
                users += self._jobs[0].users
                jobs.append(self._jobs.popleft())
            return jobs


def _finish(jobs: list[_Job], engine: Engine) -> None:
    """Set the results of jobs; where one of several fails, each is run alone, so that no caller pays for another."""
    try:
        if jobs[0].call:
            results = [jobs[0].call()]
        else:
            answers = iter(engine.answer([request for job in jobs for request in job.requests]))
            results = [list(islice(answers, job.users)) for job in jobs]
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
        else:
            for job in jobs:
                _finish([job], engine)
        return
    for job, result in zip(jobs, results, strict=True):
        with suppress(Exception):  # the caller has gone
            job.future.set_result(result)
