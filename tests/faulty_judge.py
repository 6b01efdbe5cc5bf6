"""A judge's server that fails in every way that servers and networks do, on a port of this machine.

`script` names what each request in turn meets; the last name stands for all that follow. A name is a status, a reply's
text, or one of the faults below.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-" + "never-to-be-seen-0123456789"
LARGE = 64 << 20


def completion(content: Any = '{"score": 4}', *, finish_reason: Any = "stop", **more: Any) -> dict[str, Any]:
    return {
        "model": "judge-2026",
        "system_fingerprint": "fp1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7},
        **more,
    }


# Replies of status 200 in which there is no verdict.
WITHOUT_VERDICT: dict[str, bytes] = {
    name: reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    for name, reply in {
        "empty_body": b"",
        "garbage": bytes(range(256)),
        "html": b'<!doctype html><title>503</title>{"score": 5}',
        "cut_json": json.dumps(completion()).encode()[:-9],
        "no_object": [completion()],
        "key_twice": b'{"choices": [], ' + json.dumps(completion()).encode()[1:],
        "deep": b"[" * 100_000,
        "compressed": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff",
        "no_choices": {"choices": []},
        "two_choices": completion(choices=completion()["choices"] * 2),
        "null_content": completion(None),
        "blank_content": completion(" \n"),
        "unfinished": completion(finish_reason="length"),
        "no_finish_reason": completion(finish_reason=None),
        "filtered": completion(finish_reason="content_filter"),
        "nan": completion('{"score": NaN}'),
        "infinity": completion('{"score": Infinity}'),
        "overflow": completion('{"score": 1e999}'),
        "true": completion('{"score": true}'),
        "eleven": completion('{"score": 11}'),
        "minus_three": completion('{"score": -3}'),
        "zero": completion('{"score": 0}'),
        "null_score": completion('{"score": null}'),
        "text_score": completion('{"score": "4"}'),
        "list_score": completion('{"score": [4]}'),
        "full_width": completion('{"score": 4}'.replace("4", "\uff14")),
        "long_number": completion('{"score": ' + "4" * 5000 + "}"),
        "two_scores": completion('{"score": 5}\n{"score": 1}'),
        "score_twice": completion('{"score": 5, "score": 1}'),
        "other_keys": completion('{"score": 4, "final": 5}'),
        "prose": completion("I would give it a 4 out of 5."),
        "bare_number": completion("4"),
        "surrogate": completion("\ud800"),
    }.items()
}


class FaultyJudge:
    """`bodies` and `names` are what was asked, in order; `elsewhere` counts requests to where redirects lead."""

    def __init__(self) -> None:
        self.script: Sequence[str | bytes] = ["ok"]
        self.bodies: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.keys: set[str | None] = set()
        self.elsewhere = 0
        self.at_once = self.most_at_once = 0
        self.url = ""
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def asked(self) -> int:
        return len(self.bodies)


@contextmanager
def serving() -> Iterator[FaultyJudge]:
    judge = FaultyJudge()

    class Handler(_Handler):
        pass

    Handler.judge = judge
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        judge.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: FaultyJudge

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.judge.elsewhere += 1
        self.answer(200, json.dumps(completion('{"score": 5}')).encode())

    def do_POST(self) -> None:
        if self.path.startswith("/elsewhere"):
            self.do_GET()
            return
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            step = judge.script[min(judge.asked, len(judge.script) - 1)]
            judge.bodies.append(body)
            judge.names.append(self.headers["Idempotency-Key"])
            judge.keys.add(self.headers["Authorization"])
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            self.meet(step)
        except OSError:
            self.close_connection = True
        finally:
            with judge.lock:
                judge.at_once -= 1

    def meet(self, step: str | bytes) -> None:
        if isinstance(step, bytes):
            self.answer(200, step)
        elif step in WITHOUT_VERDICT:
            self.answer(200, WITHOUT_VERDICT[step])
        elif step[:3].isdigit():
            status, _, wait = step.partition(" ")
            text = b"" if status == "204" else f"no: {KEY} is wrong".encode()
            self.answer(int(status), text, {"Retry-After": wait} if wait else {})
        else:
            getattr(self, step)()

    def answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def ok(self) -> None:
        self.answer(200, json.dumps(completion()).encode())

    def drop(self) -> None:
        """No answer at all."""
        self.close_connection = True

    def cut_body(self) -> None:
        data = json.dumps(completion()).encode()
        self.answer(200, data[:50], length=len(data))
        self.close_connection = True

    def no_http(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        self.close_connection = True

    def hang(self) -> None:
        self.judge.released.wait()
        self.close_connection = True

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.judge.released.wait(0.1):
            self.wfile.write(b"X-More: 1\r\n")

    def drip_body(self) -> None:
        self.answer(200, b"{", length=1 << 20)
        while not self.judge.released.wait(0.1):
            self.wfile.write(b" ")

    def too_large(self) -> None:
        self.answer(200, b"", length=LARGE)
        for _ in range(LARGE >> 20):
            self.wfile.write(b" " * (1 << 20))

    def redirect(self) -> None:
        self.answer(307, b"", {"Location": f"{self.judge.url.removesuffix('/v1')}/elsewhere"})

    def see_other(self) -> None:
        self.answer(303, b"", {"Location": f"{self.judge.url.removesuffix('/v1')}/elsewhere"})
