"""Several trainer processes of one machine find out the same, and one of them says it."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from tandem_protocol.once import first_to_say
from tandem_protocol.processes import STATUS_DIR
from tandem_rollout.availability import REPEAT_S, Availability
from tandem_rollout.client import GeneratorClient

URL = "http://generator:8000"


def test_a_message_is_said_by_the_first_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_say("a")
    assert first_to_say("a"), "a single process decides by itself"
    monkeypatch.setenv(STATUS_DIR, str(tmp_path))
    assert [first_to_say(message) for message in ("a", "a", "b", "b")] == [True, False, True, False]
    monkeypatch.setenv(STATUS_DIR, str(tmp_path / "absent"))
    assert first_to_say("a"), "rather twice than never"


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.anyio
async def test_one_process_reports_that_all_wait_for_the_same_generator(
    reports: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = GeneratorClient([URL], None, reports=reports, transport=httpx.MockTransport(refuse))
    with pytest.raises(TimeoutError, match="refused"):
        await client.wait_ready(2)  # long enough for a try on a busy machine
    assert len(caplog.messages) == reports


def test_another_process_reports_only_an_outage_that_lasts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 0.0
    availability = Availability(clock=lambda: now_s, delay_s=REPEAT_S)
    availability.failed(URL, "refused")
    availability.answered(URL)
    availability.failed(URL, "refused")
    availability.gone(set())
    availability.failed(URL, "refused")
    assert caplog.messages == []
    now_s += REPEAT_S
    availability.failed(URL, "refused")
    availability.answered(URL)
    assert caplog.messages == [
        f"waiting for generator {URL} after 30 s: refused",
        f"generator {URL} answers again after 30 s",
    ]
