"""No secret is in what a run prints or writes."""

from __future__ import annotations

import json
from collections.abc import Callable

from support.generators import TOKEN
from support.projects import Project

PASSWORD = "planted-password"
HF_TOKEN = "planted-hf-token"
SECRETS = (PASSWORD, HF_TOKEN, TOKEN)


def test_no_output_of_a_run_contains_a_secret(make_project: Callable[..., Project]):
    project = make_project(max_steps=1, start_timeout_s=1)
    project.forks = False
    plant = ["--generator.env", json.dumps({"HF_TOKEN": HF_TOKEN})]
    runs = {
        "": ("text", 0),
        f"http://user:{PASSWORD}@127.0.0.1:1": ("json", 1),  # nothing listens
        f"http://user:{PASSWORD}@127.0.0.1:{project.generator.port}": ("text", 2),  # the password replaces the token
    }
    texts = []
    for url, (form, status) in runs.items():
        words = ["--shared.generators", json.dumps([url]), "--trainer.max_steps=2"] if url else []
        ended = project.train(*plant, *words, TANDEM_LOG=form, HF_TOKEN=HF_TOKEN)
        assert ended.returncode == status, ended.stderr
        assert not url or "http://***@127.0.0.1:" in ended.stderr
        texts.append(ended.stdout + ended.stderr)
    files = [path for path in project.directory.rglob("*") if path.is_file() and path.name != "config.yaml"]
    texts += [path.read_text(errors="replace") for path in [project.generator.log, *files]]
    assert not [text for text in texts if any(secret in text for secret in SECRETS)]
