"""An OpenAI-compatible server that misbehaves in one way at a time. It imports nothing of the package.

`started(mode)` serves in a thread and yields the server: its address, the bodies it was sent, and the `mode`, which may be
changed while it runs. See `MODES` for what it can do.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, finish="stop", usage=True, **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": content, "refusal": None}, "finish_reason": finish}
    counted = {"usage": {"prompt_tokens": 100, "completion_tokens": 2}} if usage else {}
    return {"id": "c-1", "object": "chat.completion", "created": 1, "model": "odd-1", "choices": [choice], **counted, **more}


def error(message, **details):
    return {"error": {"message": message, "type": "invalid_request_error", **details}}


def refuses(*names):
    "A service that takes none of some settings, and says so in OpenAI's way."
    def answer(body, key):
        for name in names:
            if name in body:
                return 400, error(f"Unsupported parameter: '{name}'", param=name, code="unsupported_parameter")
        return 200, completion("yes")

    return answer


MODES = {
    "yes": lambda body, key: (200, completion("yes")),
    "500": lambda body, key: (500, error("The server had an error", type="server_error")),
    "no settings": refuses("temperature", "seed", "reasoning_effort"),
    "no structure": refuses("response_format"),
    "backticks": lambda body, key: (400, error("`temperature` is deprecated for this model.")) if "temperature" in body else (200, completion("yes")),
}


def as_php(content):
    return json.dumps(content).replace("/", "\\/").encode()


def as_numbers(content, key):
    return json.dumps(content).replace(key, "".join(f"\\u{ord(c):04X}" for c in key)).encode()


MODES |= {
    "401 escaped": lambda body, key: (401, as_php(error(f"Incorrect API key provided: {key}", code="invalid_api_key"))),
    "200 escaped": lambda body, key: (200, as_php(completion(f"your key is {key}", model=key, system_fingerprint=key)), {"x-request-id": key}),
    "200 in numbers": lambda body, key: (200, as_numbers(completion(f"your key is {key}", model=key), key)),
    "page": lambda body, key: (200, b"<!doctype html><html><title>Log in to the proxy</title></html>"),
    "error in 200": lambda body, key: (200, {"error": {"message": "Provider returned error: model overloaded", "code": 502}}),
    "choice of error": lambda body, key: (200, completion("", finish="error")),
    "no choices": lambda body, key: (200, {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 0}}),
    "cut": lambda body, key: (200, b'{"choices": [{"message": {"content": "re'),
    "half-way": lambda body, key: (None, b'{"choices": [{"message"'),
    "deep": lambda body, key: (200, b"[" * 200_000),
    "deep 500": lambda body, key: (500, b'{"error": ' + b"[" * 200_000),
    "moderation": lambda body, key: (403, error("Your input was flagged", code=403, metadata={"reasons": ["violence"], "flagged_input": "..."})),
    "tomorrow": lambda body, key: (429, error("Daily limit reached", code="rate_limit_exceeded"), {"retry-after": "86400"}),
    "no such year": lambda body, key: (429, error("later"), {"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}),
    **{f"{name} usage": lambda body, key, tokens=tokens: (200, json.dumps(completion("yes")).replace('"prompt_tokens": 100', f'"prompt_tokens": {tokens}').encode()) for name, tokens in (("infinite", "Infinity"), ("huge", "1" + 30 * "0"), ("negative", "-1000000"))},
    "slowly": lambda body, key: time.sleep(0.5) or (200, completion("yes")),
    "green": lambda body, key: (200, completion("green")),
}


class Odd(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.received.append(body)
        status, content, *headers = MODES[self.server.mode](body, self.headers["authorization"].split()[-1])
        if status is None:  # closed half-way
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n" + content)
            self.close_connection = True
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def started(mode):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.mode, server.received, server.daemon_threads = mode, [], True
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
