"""A stand-in for the model hub, on loopback: what `huggingface_hub` asks when a folder is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class FakeHub:
    """with FakeHub() as hub: ...; then `made` is the repository that was asked for, `files` what was committed."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuses = False
        self.private = True
        self.older: list[str] = []
        """Files that the repository has from before."""
        self.deleted: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/tree/" in self.path:
                    tree = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in hub.older]
                    return self.answer(200, tree)
                siblings = [{"rfilename": path} for path in hub.older]
                about = {"siblings": siblings, "sha": "0" * 40, "id": "me/recovered", "private": hub.private}
                return self.answer(200, about)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization", ""))
                if hub.refuses:
                    self.answer(403, {"error": "no"})
                elif self.path == "/api/repos/create":
                    hub.made = json.loads(body)
                    self.answer(200, {"url": f"{hub.url}/me/recovered"})
                elif self.path == "/api/validate-yaml":
                    self.answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    asked = [one["path"] for one in json.loads(body)["files"]]
                    self.answer(
                        200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]}
                    )
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines() if line]
                    hub.deleted |= {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
                    for line in lines:
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    self.answer(200, {"commitUrl": f"{hub.url}/me/recovered/commit/{'0' * 40}", "commitOid": "0" * 40})
                else:
                    self.answer(404, {"error": self.path})

            def answer(self, status: int, content: Any) -> None:
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
