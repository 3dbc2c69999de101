"""An OpenAI-compatible server of a Qwen2-VL folder through stock transformers. It imports nothing of the package.

`python tests/small_model_server.py FOLDER` prints the port it listens on.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration


class Model:
    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, messages, most):
        "Text and token counts of a greedy answer to one conversation with one picture."
        address = next(part["image_url"]["url"] for part in messages[-1]["content"] if part["type"] == "image_url")
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))).convert("RGB")
        content = [{"type": "image"} if part["type"] == "image_url" else part for part in messages[-1]["content"]]
        chat = [*messages[:-1], {"role": "user", "content": content}]
        image = self.processor(images=[picture], return_tensors="pt")
        count = int(image["image_grid_thw"].prod()) // self.processor.merge_size**2
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).replace("<|image_pad|>", "<|image_pad|>" * count)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        with torch.no_grad():
            written = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **image,
                max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=ends[1],
            )[0, ids.shape[1]:]  # fmt: skip
        return self.tokenizer.decode(written, skip_special_tokens=True), ids.shape[1], len(written)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            text, tokens_in, tokens_out = self.server.model.answer(asked["messages"], asked["max_tokens"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice], "usage": usage}
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.model, server.lock = Model(sys.argv[1]), Lock()
    print(server.server_port, flush=True)
    server.serve_forever()
