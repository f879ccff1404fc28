"""A store that the first version of Tandem wrote is still read, served and continued. Its bytes are literal here."""

from __future__ import annotations

import struct

from support.engines import ScriptedEngine, Start, WatchedStore
from support.weights import publish
from tandem_protocol.messages import ModelFingerprint
from tandem_protocol.version import Version

V7, NEXT = Version(7, 2), Version(8, 3)
HEADER = b'{"embed.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
MANIFEST = """{
 "format": 1,
 "run": "digits",
 "version": "7.2",
 "kind": "full",
 "fingerprint": {
  "config": "c0",
  "tokenizer": "70",
  "parameters": "9a"
 },
 "files": [
  {
   "name": "shard-00000.safetensors",
   "size_bytes": 92,
   "xxh3_128": "7ea09a7bfc4896201e1a54e78a52f925"
  }
 ],
 "tensors": [
  {
   "name": "embed.weight",
   "dtype": "F32",
   "shape": [
    2,
    2
   ],
   "file": "shard-00000.safetensors"
  }
 ]
}"""


def write(store: WatchedStore) -> None:
    """Write what the first version left when its trainer and its generator had ended."""
    folder = store.root / "versions/000007.2"
    folder.mkdir(parents=True)
    (folder / "shard-00000.safetensors").write_bytes(struct.pack("<Q", len(HEADER)) + HEADER + bytes(range(16)))
    (folder / "manifest.json").write_text(MANIFEST)
    (store.root / "LATEST").write_text("7.2\n")
    (store.root / "WRITER").write_text("run digits, pid 7 on host\n")
    (store.root / "served").mkdir()
    (store.root / "served/replica-0.json").write_text('{"versions":["7.2"],"renewed_unix_s":1764000000.0}')


async def test_it_is_verified_and_served(start: Start, engine: ScriptedEngine, store: WatchedStore) -> None:
    write(store)
    engine.facts = engine.facts._replace(
        shapes={"embed.weight": (2, 2)}, fingerprint=ModelFingerprint(config="c0", tokenizer="70", parameters="9a")
    )
    manifest, _ = store.read(V7)
    assert manifest.to_bytes() == MANIFEST.encode(), "the digest of its bytes is the one that was sent then"
    switcher = await start()
    assert switcher.version == engine.holds == V7


async def test_a_trainer_continues_it_under_a_newer_attempt(store: WatchedStore) -> None:
    write(store)
    with store.writer("a trainer of this release"):
        assert store.next_attempt() == NEXT.attempt
        publish(store, NEXT)
        assert store.retain(1) == [V7]
    assert store.latest() == NEXT
