"""`record.json`: who made what, where, and that a stage which went on elsewhere names both places."""

import shutil

import pytest

from rarec.entry import open_context
from rarec.files import read_json, write_json
from rarec.stages import record
from rarec.stages.record import perform
from tests.conftest import make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


@pytest.fixture
def begun_elsewhere(world):
    """A run whose first stage was begun on another machine by another commit, and is to be made again here."""
    context = open_context(world, [])
    perform(context, "prepare")
    here = read_json(context.paths.record)["prepare"]
    other = {**here, "seconds": 100.0, "hardware": "Another CPU", "commit": "0123"}
    write_json(context.paths.record, {"prepare": other})
    shutil.rmtree(context.paths.prepare)
    return context, here, other


def test_a_stage_that_went_on_elsewhere_names_both_places(begun_elsewhere):
    context, here, other = begun_elsewhere
    perform(context, "prepare")
    noted = read_json(context.paths.record)["prepare"]
    assert {**noted, "seconds": 0} == {**here, "seconds": 0, "earlier": [without_seconds(other)]}
    assert noted["seconds"] > 100
    shutil.rmtree(context.paths.prepare)
    perform(context, "prepare")
    assert read_json(context.paths.record)["prepare"]["earlier"] == [without_seconds(other)]


def test_what_is_made_fresh_was_made_here_alone(begun_elsewhere):
    context, here, _ = begun_elsewhere
    context.fresh = True
    perform(context, "prepare")
    noted = read_json(context.paths.record)["prepare"]
    assert {**noted, "seconds": 0} == {**here, "seconds": 0}


def test_the_commit_is_asked_for_before_the_work(world, monkeypatch):
    """An hour later the checkout may be another."""
    context, asked = open_context(world, []), []
    monkeypatch.setattr(record, "source", lambda: asked.append(context.made) or {"version": "1", "commit": "2"})
    perform(context, "prepare")
    assert asked[0] is False
    assert context.made


def without_seconds(sitting):
    return {name: value for name, value in sitting.items() if name != "seconds"}
