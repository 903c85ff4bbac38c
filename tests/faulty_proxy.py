"""An HTTP proxy that makes an object store fail: python faulty_proxy.py ENDPOINT FOLDER.

FOLDER/faults.json lists what goes wrong, and may change at any time: {"fault": one of `FAULTS`, "method": "GET",
"path": a regular expression, "times": how often (without it always)}. FOLDER/requests.jsonl tells what was asked.
The port is printed.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FAULTS = {
    "throttled": (503, "SlowDown", "Please reduce your request rate."),
    "broken": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "cut": "the connection ends in the middle of the body, of the answer or, for a PUT, of the request",
    "unanswered": "the request is done, but the connection ends without an answer",
    "slow": "a tenth of the body every 0.2 s",
    "stalled": "nothing comes, for a minute",
}


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def respond(self) -> None:
        fault = self.server.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(max(1, length // 2))
            self.close_connection = True
            return
        body = self.rfile.read(length) if length else self.chunks()
        if fault in ("throttled", "broken", "denied"):
            status, code, message = FAULTS[fault]
            error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.answer(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else error)
            return
        if fault == "stalled":
            time.sleep(60)
            self.close_connection = True
            return
        connection = http.client.HTTPConnection(self.server.endpoint, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in SKIPPED}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        found = response.read()
        if fault == "unanswered":
            self.close_connection = True
            return
        headers = {name: value for name, value in response.getheaders() if name.lower() not in SKIPPED}
        self.answer(response.status, headers, found, fault, response.getheader("Content-Length"))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

    def chunks(self) -> bytes:
        """The body of a request with chunked encoding; else nothing."""
        parts = []
        while "chunked" in self.headers.get("Transfer-Encoding", ""):
            size = int(self.rfile.readline().split(b";")[0], 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                break
        return b"".join(parts)

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None, length: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            step = len(body) // 10 + 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.2)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


SKIPPED = ("content-length", "transfer-encoding", "connection", "expect", "date", "server")  # of one connection alone


class Server(ThreadingHTTPServer):
    def __init__(self, endpoint: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.endpoint = urlsplit(endpoint).netloc
        self.folder = folder
        self._lock = threading.Lock()
        self._rules = ""
        self._counts: dict[str, int] = {}

    def fault(self, method: str, path: str) -> str | None:
        """What goes wrong with a request, if anything."""
        with self._lock:
            found = None
            text = (self.folder / "faults.json").read_text()
            if text != self._rules:
                self._rules, self._counts = text, {}
            for rule in json.loads(text):
                name = json.dumps(rule)
                wanted = re.search(rule.get("path", ""), path) and method in rule.get("method", method)
                if wanted and self._counts.get(name, 0) < rule.get("times", 1 << 30):
                    self._counts[name] = self._counts.get(name, 0) + 1
                    found = rule["fault"]
                    break
            with open(self.folder / "requests.jsonl", "a") as log:
                log.write(json.dumps({"method": method, "path": path, "fault": found, "time": time.time()}) + "\n")
            return found


if __name__ == "__main__":
    server = Server(sys.argv[1], Path(sys.argv[2]))
    print(server.server_port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()  # until the tests end
    server.serve_forever()
