"""Whatever a client sends to `rarec serve`, valid by its OpenAPI description or not, no answer is an internal error."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving import service

POSTS = ["recommend", "users/vector", "items/similar", "items/place", "explain", "compare"]
GETS = ["items", "users/sample", "bundles"]
PATHS = [("POST", f"/v1/{name}") for name in POSTS] + [("GET", f"/v1/{name}") for name in GETS]
VALID, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [(*one, VALID) for one in PATHS] + [(*one, WRONG) for one in PATHS[:-2]]  # the last two take nothing


@pytest.fixture(scope="module")
def description(run) -> Iterator[Any]:
    with service(run.directory("export"), "--device", "cpu") as started:
        yield schemathesis.openapi.from_url(f"{started.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_request_ends_in_an_error_of_the_service(description, method, path, mode):
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case: Any = data.draw(description[path][method].as_strategy(generation_mode=mode))
        answer = case.call()
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()) == {"problem", "remedy"}

    check()
