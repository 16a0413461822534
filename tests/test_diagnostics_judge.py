"""A judge behind a local endpoint: both orders, replies kept on disk, and which errors are tried again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stages.diagnostics import judge as judging
from stages.diagnostics.judge import check_judge, judge_pairs, open_judge, read_verdict
from stages.errors import JudgeError
from stages.measuring_config import EvaluateConfig
from tests.commands import SHORT, refused, result
from tests.tiny import write_jsonl

Answer = tuple[int, object]


class Endpoint:
    """A stand-in server: `answer` gets the path and the body of a request, and gives status and JSON."""

    def __init__(self, answer: Callable[[str, dict], Answer]):
        self.requests: list[tuple[str, dict, dict]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict) -> None:
                endpoint.requests.append((self.path, body, dict(self.headers)))
                status, content = answer(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status in (302, 307):
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def asked(self) -> int:
        return sum(path.endswith("/chat/completions") for path, _, _ in self.requests)


@pytest.fixture
def serve():
    started: list[Endpoint] = []

    def start(answer: Callable[[str, dict], Answer]) -> Endpoint:
        started.append(Endpoint(answer))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(judging, "LONGEST_WAIT", 0.02)


def judge_at(url: str, tmp_path):
    return open_judge(
        EvaluateConfig(
            model="m", dataset="d", judge=url, judge_model="j", against="a", judge_cache=str(tmp_path / "kept")
        )
    )


def said(text: str) -> Answer:
    return 200, {"choices": [{"message": {"content": text}}]}


def responses_of(body: dict) -> tuple[str, str]:
    content = body["messages"][1]["content"]
    return tuple(content.split(f"<response {x}>\n")[1].split(f"\n</response {x}>")[0] for x in "AB")


def longer_wins(path: str, body: dict) -> Answer:
    if path.endswith("/models"):
        return 200, {"data": []}
    a, b = responses_of(body)
    return said(f"I see. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]")


def test_every_pair_is_shown_in_both_orders_and_asked_once(serve, tmp_path):
    endpoint = serve(longer_wins)
    judge, rows = judge_at(endpoint.url, tmp_path), [("p", "long one", "short"), ("p", "ab", "cd"), ("p", "x", "x")]
    done: list[int] = []
    assert judge_pairs(judge, rows, done.append) == [(1.0, 1.0), (0.5, 0.5), (0.5, 0.5)]
    assert endpoint.asked == 4 and sorted(done) == [2, 3]  # equal responses are a tie without a request
    assert {responses_of(body) for _, body, _ in endpoint.requests[:4]} >= {
        ("long one", "short"),
        ("short", "long one"),
    }
    assert judge_pairs(judge, rows, done.append) == [(1.0, 1.0), (0.5, 0.5), (0.5, 0.5)]
    assert endpoint.asked == 4


def test_a_judge_that_prefers_a_place_leaves_a_tie(serve, tmp_path):
    endpoint = serve(lambda path, body: said("[[A]]"))
    assert judge_pairs(judge_at(endpoint.url, tmp_path), [("p", "a", "b")], lambda done: None) == [(1.0, 0.0)]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("so [[A]]", 1.0), ("[[A]] no, [[b]]", 0.0), ("[[C]]", 0.5), ("[[tie]]", 0.5), ("**B**", 0.0), ("A or B", None),
     ("The better response is B.", 0.0), ('{"winner": "A"}', 1.0), ("This answer is a good one", None),
     ("", None)],
)  # fmt: skip
def test_the_last_mark_is_the_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_request_is_repeated_while_the_server_is_busy_and_no_longer(serve, tmp_path):
    answers = iter([(429, {}), (503, {}), said("[[A]]"), said("[[B]]")])
    endpoint = serve(lambda path, body: next(answers))
    assert judge_pairs(judge_at(endpoint.url, tmp_path), [("p", "a", "b")], lambda done: None) == [(1.0, 1.0)]
    busy = serve(lambda path, body: (503, {"error": "overloaded"}))
    with pytest.raises(JudgeError, match="503.*overloaded"):
        judge_pairs(judge_at(busy.url, tmp_path), [("p", "a", "b")], lambda done: None)
    assert busy.asked == judging.ATTEMPTS


def test_a_mistake_is_not_repeated(serve, tmp_path, monkeypatch):
    endpoint = serve(lambda path, body: (401, {"error": "bad key"}))
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    judge = judge_at(endpoint.url, tmp_path)
    with pytest.raises(JudgeError, match="401") as caught:
        check_judge(judge)
    assert "--judge-key" in caught.value.fix and "secret" not in str(caught.value)
    assert len(endpoint.requests) == 1 and endpoint.requests[0][2]["Authorization"] == "Bearer secret"


def test_a_model_without_a_temperature_is_asked_plainly(serve, tmp_path):
    endpoint = serve(lambda path, body: (400, {}) if "temperature" in body else said("[[A]]"))
    assert judge_pairs(judge_at(endpoint.url, tmp_path), [("p", "a", "b")], lambda done: None) == [(1.0, 0.0)]


def test_no_redirect_takes_the_key_elsewhere(serve, tmp_path):
    endpoint = serve(lambda path, body: (302, {}))
    with pytest.raises(JudgeError, match="302"):
        judge_pairs(judge_at(endpoint.url, tmp_path), [("p", "a", "b")], lambda done: None)


@pytest.mark.parametrize("answer", [{"choices": []}, [], {"choices": [{"text": "A"}]}])
def test_a_reply_of_another_form_is_an_error(serve, tmp_path, answer):
    endpoint = serve(lambda path, body: (200, answer))
    with pytest.raises(JudgeError, match="no chat completion"):
        judge_pairs(judge_at(endpoint.url, tmp_path), [("p", "a", "b")], lambda done: None)


def test_a_damaged_reply_on_disk_is_asked_again_and_the_key_is_not_kept(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    endpoint = serve(longer_wins)
    judge = judge_at(endpoint.url, tmp_path)
    judge_pairs(judge, [("p", "aa", "b")], lambda done: None)
    files = sorted(judge.cache.iterdir())
    assert len(files) == 2 and not any("secret" in file.read_text() + file.name for file in files)
    files[0].write_text("{")
    assert judge_pairs(judge, [("p", "aa", "b")], lambda done: None) == [(1.0, 1.0)]
    assert endpoint.asked == 3


def test_an_unreachable_judge_is_refused_unless_replies_are_kept(tmp_path):
    judge = judge_at("http://127.0.0.1:9", tmp_path)
    with pytest.raises(JudgeError, match="Connection refused"):
        check_judge(judge)
    (judge.cache / "x.json").write_text('{"reply": "[[A]]"}')
    assert "only replies in" in check_judge(judge)[0]


@pytest.mark.full
def test_evaluate_reports_the_judges_win_rate_and_a_repeat_costs_nothing(serve, chain, tmp_path):
    endpoint, found = serve(longer_wins), chain()
    line = ("evaluate", "--model", found.ppo, "--against", found.base, "--dataset", found.prompts, *SHORT)
    line += ("--limit-rows", 12, "--judge", endpoint.url, "--judge-model", "j", "--judge-cache", tmp_path / "kept")
    report = result(*line, "--examples", 12)
    shares = [
        1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5
        for a, b in ((row["response"], row["against"]) for row in report["examples"])
    ]
    rate = report["win_rate"]["judge"]
    assert rate["rate"] == pytest.approx(sum(shares) / 12) and rate["n"] == 12 and rate["orders_differ"] == 0
    assert [rate[name] for name in ("wins", "ties", "losses")] == [shares.count(x) for x in (1.0, 0.5, 0.0)]
    assert {"adjusted", "adjusted_low", "adjusted_high"} <= rate.keys()
    asked = endpoint.asked
    endpoint.server.shutdown()
    endpoint.server.server_close()
    assert result(*line, "--examples", 12)["win_rate"]["judge"] == rate and endpoint.asked == asked > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--judge", "http://h/v1", "--judge-model", "j"), "--against"),
        (("--judge", "http://h/v1", "--against", "b"), "--judge-model"),
        (("--judge", "h:80", "--judge-model", "j", "--against", "b"), "http://"),
        (("--judge", "http://me:key@h/v1", "--judge-model", "j", "--against", "b"), "--judge-key"),
        (("--judge-model", "j"), "there is no judge"),
    ],
)
def test_what_a_judge_needs(tmp_path, flags, told):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red"}])
    assert told in refused("evaluate", "--model", "m", "--dataset", data, *flags)
