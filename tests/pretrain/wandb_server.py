"""As much of a W&B server as a run and `wandb sync` need: it keeps what it is sent, in memory.

Tried with wandb 0.31. It answers the queries about runs with what a server that knows the run
would, and stores the history at the offsets that it comes with, as the real one does.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = -1


@dataclass
class WandbServer:
    """refuse: an HTTP status to answer everything with, HANG for no answer, 0 for a real one."""

    refuse: int = 0
    address: str = ""
    runs: set[str] = field(default_factory=set)  # ids
    history: list[dict[str, Any]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        content = json.loads(body) if body.startswith(b"{") else {}
        if path.endswith("/file_stream"):
            sent = (content.get("files") or {}).get("wandb-history.jsonl")
            if sent:
                self.history[sent["offset"] :] = [json.loads(row) for row in sent["content"]]
            return {"limits": {}}
        query = re.search(r"(?:query|mutation) (\w+)", content.get("query", ""))
        name = query[1] if query else ""
        run_id = content.get("variables", {}).get("name")
        if name == "RunResumeStatus":
            known = self.bucket(run_id) if run_id in self.runs else None
            return {"data": {"model": {"id": "p", "name": "proj", "bucket": known}}}
        if name == "UpsertBucket":
            inserted = run_id not in self.runs
            self.runs.add(run_id)
            return {"data": {"upsertBucket": {"bucket": self.bucket(run_id), "inserted": inserted}}}
        if name == "CreateRunFiles":
            return {"data": {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def bucket(self, run_id: str) -> dict[str, Any]:
        last = self.history[-1:]
        return {
            "id": "run",
            "name": run_id,
            "displayName": run_id,
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in last]),
            "summaryMetrics": json.dumps(last[0] if last else {}),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "project": {"id": "p", "name": "proj", "entity": {"id": "e", "name": "ent"}},
            "files": {"edges": []},
        }


@contextlib.contextmanager
def wandb_server(refuse: int = 0) -> Iterator[WandbServer]:
    """A server at `address` until the context ends."""
    state = WandbServer(refuse)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if state.refuse == HANG:
                state.closed.wait()
                return
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {"errors": [{"message": "permission denied"}]}
            if not state.refuse:
                answer = state.answer(self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(state.refuse or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()
