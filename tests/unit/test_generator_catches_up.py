"""A generator that starts while a trainer publishes serves the newest version, also if older ones vanish meanwhile."""

from __future__ import annotations

import pytest

from support.engines import ScriptedEngine, Start, WatchedStore
from support.weights import publish
from tandem_protocol.manifest import Manifest
from tandem_protocol.version import Version

V1, V2 = Version(1, 1), Version(2, 1)


async def test_a_version_that_was_deleted_before_it_could_be_read_is_not_waited_for(
    start: Start, engine: ScriptedEngine, store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, V1)
    read = WatchedStore.read

    def read_after_a_publish(self: WatchedStore, version: Version) -> tuple[Manifest, str]:
        if version == V1 and V2 not in self.versions():
            publish(self, V2)
            self.retain(1)
        return read(self, version)

    monkeypatch.setattr(WatchedStore, "read", read_after_a_publish)
    switcher = await start(visible_timeout_s=3600.0)
    assert switcher.version == V2
    assert "load 1.1" not in engine.calls


async def test_a_newest_version_that_the_volume_does_not_show_yet_is_waited_for(
    start: Start, store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, V1)
    versions, hidden = WatchedStore.versions, [V1] * 3

    def shown(self: WatchedStore) -> list[Version]:
        return [] if hidden and hidden.pop() else versions(self)

    monkeypatch.setattr(WatchedStore, "versions", shown)
    switcher = await start()
    assert switcher.version == V1
