"""An OpenAI-compatible server with every fault a service has. It imports nothing of the package.

What it does is decided by the number in the question ("sample 1234"), see `behaviour_of`; faults of the moment happen to
a sample's first request only. `GET /counts` tells how often each sample was asked and fully answered.
`python tests/faulty_server.py [--delay SECONDS] [--slow SECONDS] [--gather COUNT]` prints the port it listens on;
with --gather the first requests wait until so many are in flight.
"""

import argparse
import asyncio
import json
import re

BEHAVIOURS = (
    "429", "500", "slow", "closed", "invalid", "refusal", "content_filter", "400 policy", "400 azure", "sorry",
    "cannot infer", "off list", "empty", "always 500", "400 image", "wrong", "cut", "yes",
)  # fmt: skip
CYCLE = 50  # samples; those beyond the behaviours are answered with yes
REASONS = {200: "OK", 400: "Bad Request", 429: "Too Many Requests", 500: "Internal Server Error"}


def behaviour_of(number):
    behaviour = BEHAVIOURS[min(number % CYCLE, len(BEHAVIOURS) - 1)]
    return "yes" if behaviour == "slow" and number > 2500 else behaviour  # no waiting at the end of a test


def completion(content, finish="stop", **message):
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {
        "id": "c-1", "object": "chat.completion", "created": 1, "model": "faulty-1-2026-01-01", "system_fingerprint": "fp_7",
        "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
    }  # fmt: skip


def error(message, **details):
    return {"error": {"message": message, "type": "invalid_request_error", **details}}


def reply(behaviour, key):
    "Status, headers, body. The key is repeated wherever a careless service might repeat it."
    answers = {
        "refusal": completion(None, refusal="I can't help with identifying people."),
        "content_filter": completion("", finish="content_filter"),
        "sorry": completion("I'm sorry, but I can't assist with that."),
        "cannot infer": completion("It cannot be determined from the image."),
        "off list": completion(f"a rifle (your key is {key})"),
        "empty": completion(""), "wrong": completion("No."), "cut": completion(None, finish="length"),
    }  # fmt: skip
    if behaviour == "400 policy":
        return 400, {}, error("Your input image may contain content that is not allowed.", code="content_policy_violation")
    if behaviour == "400 azure":
        inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"sexual": {"filtered": True}}}
        return 400, {}, error("The response was filtered", code="content_filter", innererror=inner)
    if behaviour == "400 image":
        return 400, {}, error(f"Invalid image, key {key}", code="invalid_image_format")
    return 200, {"x-request-id": f"r-{key}"}, answers.get(behaviour, completion("Yes."))


class Server:
    def __init__(self, delay, slow, gather):
        self.delay, self.slow, self.gather = delay, slow, gather
        self.asked, self.answered, self.bad_keys, self.flying, self.most = {}, {}, 0, 0, 0
        self.gathered = asyncio.Event()

    async def send(self, writer, status, headers, body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} {REASONS[status]}", "content-type: application/json", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()

    async def chat(self, writer, key, body):
        "Answer one request; False closes the connection."
        number = int(re.search(rb"sample (\d+)", body)[1])
        first = number not in self.asked
        self.asked[number] = self.asked.get(number, 0) + 1
        behaviour = behaviour_of(number)
        if self.flying >= self.gather:
            self.gathered.set()
        await self.gathered.wait()
        await asyncio.sleep(self.delay)
        if behaviour == "429" and first:
            await self.send(writer, 429, {"retry-after": "1" if number % 5000 == 0 else "0"}, error(f"Rate limit reached for {key}", code="rate_limit_exceeded"))
        elif behaviour == "always 500" or (behaviour == "500" and first):
            await self.send(writer, 500, {}, error(f"The server had an error with {key}"))
        elif behaviour == "slow" and first:
            await asyncio.sleep(self.slow)
            return False
        elif behaviour == "closed" and first:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 400\r\n\r\n" + b'{"choices": [{"message": {"con')
            await writer.drain()
            return False
        elif behaviour == "invalid" and first:
            await self.send(writer, 200, {}, b'{"choices": [{"message": {"content": "Yes."')
        else:
            self.answered[number] = self.answered.get(number, 0) + 1
            await self.send(writer, *reply(behaviour, key))
        return True

    async def serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                if head.startswith("GET /counts"):
                    counts = {"asked": self.asked, "answered": self.answered, "bad_keys": self.bad_keys, "most": self.most}
                    await self.send(writer, 200, {}, counts)
                    continue
                length = int(re.search(r"content-length: *(\d+)", head, re.IGNORECASE)[1])
                key = re.search(r"authorization: *Bearer +(\S+)", head, re.IGNORECASE)
                self.bad_keys += key is None
                body = await reader.readexactly(length)
                self.flying += 1
                self.most = max(self.most, self.flying)
                try:
                    if not await self.chat(writer, key[1] if key else "", body):
                        break
                finally:
                    self.flying -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=4.0)
    parser.add_argument("--gather", type=int, default=0)
    options = parser.parse_args()
    server = await asyncio.start_server(Server(options.delay, options.slow, options.gather).serve, "127.0.0.1", 0, backlog=1000, limit=2**24)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
