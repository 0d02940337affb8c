"""A server that speaks the OpenAI API: limits with true headers, faults on demand, and a log of its own.

    python server.py --log requests.jsonl --limit requests:100/1 --fault 500:0.05 --seed 1

Prints its port. Answers are a function of the request. Faults come from the command line (``--fault KIND:SHARE``) or
from a marker in the first user message: ``[[KIND]]`` always, ``[[KIND:2]]`` the first two times. Standard library only
(``--model`` apart).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import re
import time
from pathlib import Path
from runpy import run_path
from typing import Any

MARKER = re.compile(r"\[\[(\w+)(?::(\d+))?\]\]")
OF_TRANSPORT = {
    "500", "503", "429", "401", "403", "404", "quota", "400", "context", "slow", "drop", "torn_body", "error_body",
    "odd_body", "later",
}  # fmt: skip
WORDS = ["so", "then", "we", "take", "the", "next", "step", "and", "check", "it", "again", "until", "all", "is", "done"]


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


class Limit:
    """``requests:100/60`` or ``tokens:5000/1/window``: so many in so many seconds, as a bucket or as a window."""

    def __init__(self, text: str):
        self.name, _, rest = text.partition(":")
        amount, period, *kind = rest.split("/")
        self.limit, self.period, self.window = float(amount), float(period), kind == ["window"]
        self.level, self.at, self.begin = self.limit, 0.0, 0.0
        self.granted, self.used = self.limit, 0.0

    def advance(self, now: float) -> None:
        if not self.begin:
            self.begin = self.at = now
        if not self.window:
            # what a full bucket cannot hold is granted all the same: it counts against whoever did not use it
            self.granted += (now - self.at) * self.limit / self.period
            self.level = min(self.limit, self.level + (now - self.at) * self.limit / self.period)
        else:
            gone = int((now - self.begin) // self.period) - int((self.at - self.begin) // self.period)
            if gone:
                self.granted, self.level = self.granted + gone * self.limit, self.limit
        self.at = now

    def headers(self) -> dict[str, str]:
        reset = (self.limit - self.level) * self.period / self.limit
        if self.window:
            reset = self.period - (self.at - self.begin) % self.period
        return {
            f"x-ratelimit-limit-{self.name}": f"{self.limit:g}",
            f"x-ratelimit-remaining-{self.name}": str(math.floor(self.level)),
            f"x-ratelimit-reset-{self.name}": f"{max(0, round(reset * 1000))}ms",
        }


class Api:
    def __init__(self, options: argparse.Namespace):
        self.o, self.random = options, random.Random(options.seed)
        self.limits = [Limit(t) for t in options.limit]
        self.shares = {k: float(v) for k, _, v in (f.partition(":") for f in options.fault)}
        self.seen: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.log = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.number = 0
        self.author = run_path(str(Path(__file__).with_name("author.py")))["reply"] if options.author else None
        self.model: Any = None
        if options.model:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.model = AutoModelForCausalLM.from_pretrained(options.model)
            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        # recorded answers: [[words that must all occur in the messages], text]
        self.recorded = json.loads(Path(options.answers).read_text(encoding="utf-8")) if options.answers else []

    def write(self, **row: Any) -> None:
        os.write(self.log, (json.dumps(row | {"at": time.time()}) + "\n").encode())

    # what is asked, and what is answered

    def messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return body.get("messages") or body.get("input") or []

    def digest(self, body: dict[str, Any]) -> str:
        said = [[m["role"], m["content"]] for m in self.messages(body) if "fits this schema" not in m["content"]]
        return hashlib.sha256(json.dumps([body.get("model"), said]).encode()).hexdigest()

    def fault(self, body: dict[str, Any], digest: str) -> str:
        """The fault that this call meets ("" for none). Faults of content depend on the request alone."""
        users = [m["content"] for m in self.messages(body) if m["role"] == "user"]
        marker = MARKER.search(users[0] if users else "")
        if marker:
            kind, times = marker[1], int(marker[2] or 0)
            if kind in OF_TRANSPORT:
                self.seen[digest] = self.seen.get(digest, 0) + 1
                return kind if not times or self.seen[digest] <= times else ""
            turns = sum(m["role"] == "assistant" for m in self.messages(body))
            return kind if not times or turns < times else ""
        chance = random.Random(f"{self.o.seed}{digest}").random()
        for kind, share in self.shares.items():
            chance = self.random.random() if kind in OF_TRANSPORT else chance
            if chance < share:
                return kind
            chance -= 0 if kind in OF_TRANSPORT else share
        return ""

    def answer(self, body: dict[str, Any], digest: str, fault: str) -> tuple[str, str, str]:
        """Text, finish reason, refusal."""
        n = int(digest[:8], 16)
        words = " ".join(WORDS[(n >> i) % len(WORDS)] for i in range(12 + n % 12))
        text = json.dumps({"verdict": ("good", "bad")[n % 2], "score": n % 1000, "why": words})
        said = "\n".join(m["content"] for m in self.messages(body))
        text = next((t for words, t in self.recorded if all(w in said for w in words)), text)
        if self.model:
            text = self.generated(body)
        if self.author:
            text = self.author(self.messages(body)) or text
        if fault == "empty":
            return "", "stop", ""
        if fault == "refusal":
            return "", "stop", "I cannot help with that."
        if fault == "torn":
            return text[: len(text) // 2], "stop", ""
        if fault == "enum":
            return text.replace('"good"', '"fine"').replace('"bad"', '"fine"'), "stop", ""
        if fault == "length":
            return text[:20], "length", ""
        if fault == "surrogate":
            return text[:-2] + ' \ud800"}', "stop", ""
        if fault == "leak":
            return text[:-2] + f' {self.o.canary}"}}', "stop", ""
        return text, "stop", ""

    def generated(self, body: dict[str, Any]) -> str:
        """What a real model says, greedily; one request after the other."""
        cap = body.get("max_completion_tokens") or body.get("max_tokens") or 64
        ids = self.tokenizer.apply_chat_template(
            self.messages(body), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        room = self.model.config.max_position_embeddings
        ids = {k: v[:, -(room - cap) :] for k, v in ids.items()}
        out = self.model.generate(**ids, max_new_tokens=cap, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def complete(self, path: str, body: dict[str, Any], digest: str, fault: str) -> dict[str, Any]:
        text, finish, refusal = self.answer(body, digest, fault)
        given = sum(len(m["content"]) for m in self.messages(body)) // 4 + 7
        made = len(text) // 4 + 3
        if path.endswith("responses"):
            content = {"type": "refusal", "refusal": refusal} if refusal else {"type": "output_text", "text": text}
            return {
                "id": f"resp_{digest[:12]}", "object": "response", "model": body["model"],
                "status": "incomplete" if finish == "length" else "completed",
                "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
                "output": [
                    {"type": "reasoning", "summary": []},
                    {"type": "message", "role": "assistant", "content": [content]},
                ],
                "usage": {"input_tokens": given, "output_tokens": made, "input_tokens_details": {"cached_tokens": 3}},
            }  # fmt: skip
        message = {"role": "assistant", "content": None if refusal else text, "refusal": refusal or None}
        return {
            "id": f"chatcmpl-{digest[:12]}", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {
                "prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made,
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        }  # fmt: skip

    def refused(self, body: dict[str, Any], digest: str) -> tuple[int, dict[str, Any]] | None:
        """What this server does not take."""
        form = (body.get("response_format") or (body.get("text") or {}).get("format") or {}).get("type")
        if form == "json_schema" and self.o.no_schema:
            word = "Unknown parameter: response_format.json_schema" if self.o.no_schema == "named" else "Bad Request"
            return 400, error(word, "invalid_request_error")
        if form == "json_object" and self.o.no_json:
            return 400, error("response_format json_object is not supported", "invalid_request_error")
        if "max_completion_tokens" in body and self.o.no_max_completion:
            return 400, error("Unrecognized request argument: max_completion_tokens", "invalid_request_error")
        return None

    def faulty(self, fault: str, key: str) -> tuple[int, dict[str, Any], dict[str, str]] | None:
        """Statuses on demand. The key is said aloud, as some servers do."""
        kind = "invalid_request_error"
        return {
            "500": (500, error(f"broken for {key}", "server_error"), {}),
            "503": (503, error("busy", "server_error"), {"retry-after-ms": "50"}),
            "429": (429, error("slow down", "requests", "rate_limit_exceeded"), {"retry-after-ms": "100"}),
            "later": (429, error("come back tomorrow", "requests"), {"retry-after": "86400"}),
            "401": (401, error(f"Incorrect API key provided: {key}", kind, "invalid_api_key"), {}),
            "403": (403, error(f"Key {key} may not", kind), {}),
            "404": (404, error("The model does not exist", kind, "model_not_found"), {}),
            "quota": (429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), {}),
            "400": (400, error("something else is wrong", kind), {}),
            "context": (400, error("too long", kind, "context_length_exceeded", "messages"), {}),
        }.get(fault)

    async def call(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        digest = self.digest(body)
        now, told = time.monotonic(), {}
        cap = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens") or 0
        tokens = sum(len(m["content"]) for m in self.messages(body)) // 4 + cap
        cost = {"requests": 1.0, "tokens": float(tokens)}
        for limit in self.limits:
            limit.advance(now)
        short = [x for x in self.limits if x.level < cost[x.name]]
        for limit in self.limits:
            if not short:
                limit.level, limit.used = limit.level - cost[limit.name], limit.used + cost[limit.name]
            told |= limit.headers()
        budgets = {x.name: [round(x.used, 2), round(x.granted, 2)] for x in self.limits}
        fault = "" if short else self.fault(body, digest)
        seen = {"digest": digest, "id": headers.get("x-client-request-id", ""), "fault": fault, "budgets": budgets}
        if self.o.mute:
            told = {}
        if short:
            self.write(event="call", status=429, **seen)
            wait = max((cost[x.name] - x.level) * x.period / x.limit for x in short)
            return (
                429,
                error("slow down", short[0].name, "rate_limit_exceeded"),
                {**told, "retry-after-ms": f"{wait * 1000:.0f}"},
            )
        no = self.refused(body, digest)
        if no:
            self.write(event="call", status=no[0], form=body.get("response_format"), **seen)
            return *no, told
        self.write(event="call", status=0, body=body if self.o.keep_bodies else None, **seen)
        spread = random.Random(digest).uniform(0.5, 1.5)
        await asyncio.sleep(self.o.latency * spread + (self.o.slow if fault == "slow" else 0))
        if fault == "drop":
            return 0, None, {}
        faulty = self.faulty(fault, headers.get("authorization", "").removeprefix("Bearer "))
        if faulty:
            self.write(event="failed", status=faulty[0], **seen)
            return faulty[0], faulty[1], told | faulty[2]
        whole = self.complete(path, body, digest, fault)
        usage = whole["usage"]
        if fault == "error_body":
            return 200, error("something broke inside", "server_error"), told
        if fault == "odd_body":
            return 200, [None, {"choices": 3}][int(digest, 16) % 2], told
        self.write(event="answered", digest=digest, id=seen["id"], usage=usage)
        return 200, b"%s" % json.dumps(whole).encode()[:-30] if fault == "torn_body" else whole, told

    # batches

    def batch_state(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] == "in_progress" and time.time() >= batch["ready"]:
            done, failed = [], []
            for line in self.files[batch["input_file_id"]].decode().splitlines():
                row = json.loads(line)
                digest = self.digest(row["body"])
                fault = self.fault(row["body"], digest)
                bad = self.faulty(fault, "")
                if fault == "expired":
                    failed.append({"custom_id": row["custom_id"], "response": None, "error": {"code": "batch_expired"}})
                elif bad:
                    failed.append({"custom_id": row["custom_id"], "response": {"status_code": bad[0], "body": bad[1]}})
                else:
                    body = self.complete(row["url"], row["body"], digest, fault)
                    self.write(
                        event="answered", digest=digest, id=row["custom_id"], batch=batch["id"], usage=body["usage"]
                    )
                    done.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}})
            for name, rows in (("output_file_id", done), ("error_file_id", failed)):
                if rows:
                    batch[name] = f"file-{batch['id']}-{name}"
                    self.files[batch[name]] = "".join(json.dumps(r) + "\n" for r in reversed(rows)).encode()
            batch["status"] = "completed"
        return {k: v for k, v in batch.items() if k != "ready"}

    def other(self, method: str, path: str, raw: bytes, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        route = path.partition("?")[0].removeprefix("/v1")
        if route == "/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}, {}
        if method == "POST" and route == "/files":
            boundary = b"--" + headers["content-type"].partition("boundary=")[2].strip('"').encode()
            part = next(p for p in raw.split(boundary) if b"filename=" in p.partition(b"\r\n\r\n")[0])
            self.number += 1
            name = f"file-{self.number}"
            self.files[name] = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            self.write(event="file", id=name, lines=self.files[name].count(b"\n"), size=len(self.files[name]))
            return 200, {"id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 0,
                         "filename": "batch.jsonl", "purpose": "batch", "status": "processed"}, {}  # fmt: skip
        if method == "GET" and (file := re.fullmatch(r"/files/([\w-]+)/content", route)):
            return 200, self.files[file[1]], {}
        if method == "POST" and route == "/batches":
            body = json.loads(raw)
            self.number += 1
            name = f"batch-{self.number}"
            ids = [json.loads(x)["custom_id"] for x in self.files[body["input_file_id"]].decode().splitlines()]
            self.write(event="batch", id=name, ids=ids)
            self.batches[name] = {
                "id": name, "object": "batch", "status": "in_progress", "created_at": 0,
                "ready": time.time() + self.o.batch_delay,
                **body,
            }  # fmt: skip
            return (0, None, {}) if self.o.drop_batch else (200, self.batch_state(self.batches[name]), {})
        if method == "GET" and route == "/batches":
            rows = [self.batch_state(b) for b in reversed(self.batches.values())]
            return 200, {"object": "list", "data": rows, "has_more": False}, {}
        if method == "GET" and (found := self.batches.get(route.removeprefix("/batches/"))):
            return 200, self.batch_state(found), {}
        return 404, error(f"no such address {path}", "invalid_request_error"), {}

    # HTTP

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (row := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = row.decode().partition(":")
                    headers[name.lower()] = value.strip()
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if path.endswith(("/chat/completions", "/responses")) and method == "POST":
                    status, body, extra = await self.call(path, json.loads(raw), headers)
                else:
                    status, body, extra = self.other(method, path, raw, headers)
                if not status:
                    break
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                head = {"content-type": "application/json", "content-length": str(len(data)), **extra}
                lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in head.items()), "", ""]
                writer.write("\r\n".join(lines).encode() + data)
                await writer.drain()
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--answers", default="")
    parser.add_argument("--model", default="", help="answer with this model folder instead (needs transformers)")
    parser.add_argument("--author", action="store_true", help="answer our own prompts mechanically (author.py)")
    parser.add_argument("--limit", action="append", default=[], help="NAME:AMOUNT/SECONDS[/window]")
    parser.add_argument("--fault", action="append", default=[], help="KIND:SHARE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=5.0, help="seconds of the fault 'slow'")
    parser.add_argument("--mute", action="store_true", help="say nothing of limits")
    parser.add_argument("--no-schema", choices=["named", "silent"], default="")
    parser.add_argument("--no-json", action="store_true")
    parser.add_argument("--no-max-completion", action="store_true")
    parser.add_argument("--keep-bodies", action="store_true")
    parser.add_argument("--batch-delay", type=float, default=0.0)
    parser.add_argument("--drop-batch", action="store_true", help="take a batch, but break the connection")
    parser.add_argument("--canary", default="")
    api = Api(parser.parse_args())
    server = await asyncio.start_server(api.serve, "127.0.0.1", api.o.port, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
