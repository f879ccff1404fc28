"""Asks the model hub about a model that is not on a volume yet: may it be downloaded, and how large is it?"""

from __future__ import annotations

from pathlib import Path

import httpx

from tandem_protocol.secrets import mask

from .facts import ComposeService, Model
from .model import NO_MODEL, parse_model
from .unknown import Refused, Unknown

TIMEOUT_S = 15.0
DEFAULT_ENDPOINT = "https://huggingface.co"
UNAUTHORIZED = (401, 403)


def ask_hub(name: str, revision: str | None, preflight: ComposeService) -> Model | Unknown:
    """Ask with the endpoint and token of the preflight, which will download the model."""
    token = _token(preflight)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = preflight.env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    rev = revision or "main"
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as hub:
            about = hub.get(f"/api/models/{name}/revision/{rev}").raise_for_status().json()
            config = hub.get(f"/{name}/resolve/{rev}/config.json").raise_for_status().json()
        parameters = about.get("safetensors", {}).get("total")
        return parse_model(config, parameters, f"the hub ({name})", is_local=False)
    except httpx.HTTPStatusError as error:
        return _refusal(name, rev, error.response.status_code, has_token=bool(token))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        fix = mask(f"give the preflight a network that reaches {base}")
        return Unknown(NO_MODEL, fix, mask(f"{name}: {error}"))


def _token(preflight: ComposeService) -> str | None:
    """Return the token of the preflight: from its file, or else from its environment."""
    mount = preflight.mount("/hf_token")
    try:
        token = Path(mount.source).read_text().strip() if mount else ""
    except OSError:
        token = ""  # a file of another machine, or of another user
    return token or preflight.env.get("HF_TOKEN")


def _refusal(name: str, revision: str, code: int, *, has_token: bool) -> Unknown:
    answer = f"the hub answers {code} for {name} ({revision})"
    if code in UNAUTHORIZED:
        reason = "and refuses the preflight's token" if has_token else "and the preflight has no token"
        fix = (
            "accept the model's terms on the hub and set TANDEM_HF_TOKEN_FILE to a file with your token, or put the "
            "model into the project"
        )
        return Refused(NO_MODEL, fix, f"{answer} {reason}: the model is gated, or does not exist")
    if code == 404:
        return Refused(NO_MODEL, "set shared.model to a folder of the project or to a model id of the hub", answer)
    return Unknown(NO_MODEL, "try again later", answer)
