"""A fake generator for tests of the `tandem` command. It answers the probes and has a stubborn child process.

With FAKE_GENERATOR_READY=0 it never becomes ready.
"""

import argparse
import http.server
import json
import os
import signal
import sys

from stubborn import start_stubborn_child


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/readyz":
            ready = os.environ.get("FAKE_GENERATOR_READY", "1") == "1"
            self._send(200 if ready else 503, json.dumps({"ready": ready, "reason": "a fake"}))
        elif self.headers["Authorization"] != f"Bearer {os.environ['TANDEM_TOKEN']}":
            self._send(401, "")
        else:
            self._send(200, "tandem_requests_running 3.0\n")

    def _send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())


parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True)
parser.add_argument("--engine", choices=("vllm", "mock"))
parser.add_argument("--port", type=int)
parser.add_argument("--check", action="store_true")
arguments = parser.parse_args()
if arguments.check:
    print("checked generator")
    sys.exit(0)
print("serving", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
start_stubborn_child()
http.server.ThreadingHTTPServer(("127.0.0.1", arguments.port), Answers).serve_forever()
