"""A fake Kubernetes API server with the parts that helm needs to install, upgrade and uninstall.

It stores objects and runs no pods. Like the real one, it refuses changes of immutable fields, such as a Job's template.
The Jobs of helm's hooks end at once, with the outcome that the test chooses.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from support.helm import Object
from support.kube_protobuf import MAGIC, secret

KINDS = {
    "v1": ["Secret", "ConfigMap", "Service", "ServiceAccount", "PersistentVolumeClaim", "Pod"],
    "apps/v1": ["StatefulSet"],
    "batch/v1": ["Job"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
}
KIND_KEY = "x-kubernetes-group-version-kind"
IMMUTABLE = {"jobs": ("template", "completions", "completionMode"), "statefulsets": ("serviceName", "selector")}
"""Immutable keys of a spec, as far as the chart sets them."""


def plural(kind: str) -> str:
    return f"{kind.lower()[:-1]}ies" if kind.endswith("y") else f"{kind.lower()}s"


LISTED = {plural(kind): kind for kinds in KINDS.values() for kind in kinds}


class KubeApi:
    """The objects of one namespace, by (plural of the kind, name)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[tuple[str, str], Object] = {}
        self.hooks_fail = False
        self.hooks: list[str] = []
        """Names of the Jobs of hooks that have run."""

    def names(self, kind: str) -> set[str]:
        return {name for of, name in self.objects if of == plural(kind)}

    def get(self, kind: str, name: str) -> Object:
        return self.objects[plural(kind), name]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Object) -> tuple[int, Object]:
        if (found := discovery(path)) is not None:
            return 200, found
        *_, of = path.split("/namespaces/rl/") if "/namespaces/rl/" in path else [""]
        resource, _, name = of.partition("/")
        key = (resource, name or body.get("metadata", {}).get("name", ""))
        if "watch" in query:
            return 400, failure(400, "BadRequest", "this server has no watches; helm lists the objects instead")
        if method == "GET" and resource and not name:
            items = self._list(resource, query)
            return 200, {"kind": f"{LISTED[resource]}List", "apiVersion": "v1", "metadata": {}, "items": items}
        if method in ("PUT", "PATCH", "POST"):
            return self._put(key, body, new=method == "POST")
        if key not in self.objects:
            return 404, failure(404, "NotFound", f"{path} not found")
        return 200, self.objects.pop(key) if method == "DELETE" else self.objects[key]

    def _list(self, resource: str, query: dict[str, list[str]]) -> list[Object]:
        labels = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        return [
            thing
            for (of, _), thing in self.objects.items()
            if of == resource and labels.items() <= thing["metadata"].get("labels", {}).items()
        ]

    def _put(self, key: tuple[str, str], body: Object, *, new: bool) -> tuple[int, Object]:
        old = self.objects.get(key)
        if old and new:
            return 409, failure(409, "AlreadyExists", f"{key} already exists")
        changed = [
            name for name in IMMUTABLE.get(key[0], ()) if old and old["spec"].get(name) != body["spec"].get(name)
        ]
        if changed:
            return 422, failure(422, "Invalid", f"{key}: spec.{changed[0]}: field is immutable")
        body["metadata"] = {**body["metadata"], "namespace": "rl", "resourceVersion": "1", "uid": "-".join(key)}
        if body["kind"] == "Job" and "helm.sh/hook" in body["metadata"].get("annotations", {}):
            self.hooks.append(key[1])
            outcome = "Failed" if self.hooks_fail else "Complete"
            body["status"] = {"conditions": [{"type": outcome, "status": "True"}]}
        self.objects[key] = body
        return 201 if new else 200, body


def failure(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
        "message": message,
    }


def discovery(path: str) -> Object | None:
    """Return the answer to a discovery request, or None if `path` is that of an object."""
    versions = {f"/api/{name}" if "/" not in name else f"/apis/{name}": name for name in KINDS}
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": n.split("/")[0], "versions": [{"groupVersion": n, "version": "v1"}]} for n in KINDS if "/" in n
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path.startswith("/openapi/v3"):
        return openapi(path.removeprefix("/openapi/v3").strip("/"), versions)
    if path not in versions:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    resources = [
        {"name": plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for kind in KINDS[versions[path]]
    ]
    return {"kind": "APIResourceList", "groupVersion": versions[path], "resources": resources}


def openapi(path: str, versions: dict[str, str]) -> Object:
    """Return what helm reads to know that the server itself validates the objects of hooks."""
    if not path:
        return {"paths": {root[1:]: {"serverRelativeURL": f"/openapi/v3{root}"} for root in versions}}
    name = versions[f"/{path}"]
    group, _, version = name.rpartition("/")
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    validates = {"parameters": [parameter], "responses": {}}
    paths = {
        f"/{plural(kind)}": {"patch": {**validates, KIND_KEY: {"group": group, "version": version, "kind": kind}}}
        for kind in KINDS[name]
    }
    return {"openapi": "3.0.0", "info": {"title": name, "version": "1"}, "paths": paths}


@contextmanager
def kube_api() -> Iterator[KubeApi]:
    """Run the server on loopback until the end of the `with` block."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body: Any = {}
            if self.command != "DELETE":  # the body of a DELETE contains options, not an object
                body = secret(text) if text.startswith(MAGIC) else yaml.safe_load(text or "{}")
            status, made = api.answer(self.command, parts.path, parse_qs(parts.query), body)
            data = json.dumps(made).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api = KubeApi(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
