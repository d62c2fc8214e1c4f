import json

import pytest

from server.admission import Admission
from server.errors import InternalErrors, error_response
from server.health import Health
from server.limits import AdmissionLimits
from server.metrics import ServerMetrics
from server.record import current_request
from server.request_log import RequestLog
from tests.server.asgi import Connection


@pytest.fixture
def metrics():
    return ServerMetrics(Health(1), Admission(AdmissionLimits()))


async def app(scope, receive, send):
    record = current_request.get()
    record.key = "alice"
    record.prompt = "a\nsecret"
    record.prompt_tokens, record.output_tokens, record.longest_output = 3, 10, 5
    record.first_token_at, record.last_token_at = record.arrived + 0.5, record.arrived + 0.9
    await error_response(418, "teapot")(scope, receive, send)


async def ask(metrics, path="/v1/completions", *, app=app, prompts=False, ids=()):
    lines: list[str] = []
    connection = Connection(path, headers=tuple((b"x-request-id", value) for value in ids))
    answer = await connection.ask(RequestLog(app, metrics, {"my-id.7": 0.1234567}.get, lines.append, prompts=prompts))
    return answer, connection, [json.loads(line) for line in lines]


async def test_one_line_a_request(metrics):
    answer, _, (line,) = await ask(metrics, ids=[b"my-id.7"])
    assert answer.headers[b"x-request-id"] == b"my-id.7"
    assert line.pop("seconds") >= 0
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "id": "my-id.7",
        "key": "alice",
        "method": "POST",
        "path": "/v1/completions",
        "status": 418,
        "queued_seconds": 0.0,
        "prompt_tokens": 3,
        "output_tokens": 10,
        "ttft_seconds": 0.5,
        "itl_seconds": pytest.approx(0.1),
        "density": 0.12346,
    }
    count = metrics.registry.get_sample_value(
        "sparse_http_requests_total", {"path": "/v1/completions", "status": "418"}
    )
    assert count == 1


async def test_text_is_logged_only_if_asked_for(metrics):
    _, _, (line,) = await ask(metrics)
    assert "secret" not in json.dumps(line)
    _, _, (line,) = await ask(metrics, prompts=True)
    assert line["prompt"] == "a\nsecret"


@pytest.mark.parametrize(
    "ids", [[], [b""], [b"a" * 65], [b"a b"], [b"a\n"], [b"../x"], [b"\xff"], [b'"}'], [b"one", b"two"]]
)
async def test_an_id_that_is_none_is_replaced(metrics, ids):
    answer, connection, (line,) = await ask(metrics, ids=ids)
    given = answer.headers[b"x-request-id"]
    assert len(given) == 32
    assert given not in ids
    assert line["id"] == given.decode()
    # vLLM reads the header too.
    assert [value for name, value in connection.scope["headers"] if name == b"x-request-id"] == [given]


async def test_probes_are_counted_and_not_logged(metrics):
    for path in ("/livez", "/readyz", "/metrics"):
        _, _, lines = await ask(metrics, path)
        assert lines == []
        assert metrics.registry.get_sample_value("sparse_http_requests_total", {"path": path, "status": "418"}) == 1


async def test_paths_of_a_clients_making_are_one_label_and_short(metrics):
    _, _, (line,) = await ask(metrics, "/" + "x" * 10_000)
    assert len(line["path"]) == 128
    assert metrics.registry.get_sample_value("sparse_http_requests_total", {"path": "other", "status": "418"}) == 1


async def test_a_request_that_ends_without_an_answer_is_logged(metrics):
    async def silent(scope, receive, send):
        return

    _, _, (line,) = await ask(metrics, app=silent)
    assert line["status"] == 499


@pytest.mark.parametrize(("status", "retry"), [(500, False), (501, False), (503, True), (507, False)])
async def test_failures_are_told_in_fixed_texts(status, retry):
    leaky = error_response(status, "Traceback at 0x7f1234567890 in /home/me/file.py")
    answer = await Connection("/x").ask(InternalErrors(leaky))
    assert answer.status == status
    assert "0x" not in answer.error["message"]
    assert "/home" not in answer.error["message"]
    assert (b"retry-after" in answer.headers) is retry


async def test_other_answers_pass_as_they_are():
    answer = await Connection("/x").ask(InternalErrors(error_response(400, "n is 9")))
    assert (answer.status, answer.error["message"]) == (400, "n is 9")
