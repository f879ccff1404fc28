"""The script that `helm test` runs: every replica is ready, answers a rollout, and shares no device with another.

The trainer makes the same check for its own devices when it starts: it exits if a generator uses one of them.
"""

import asyncio
import os
import sys

from tandem_protocol.config import read_token
from tandem_protocol.errors import TandemError
from tandem_protocol.messages import Group, Info, Prompt, RolloutRequest, Sampling
from tandem_rollout.client import GeneratorClient

REPLICAS = int(os.environ.get("REPLICAS", "1"))
READY_TIMEOUT_S = float(os.environ.get("READY_TIMEOUT_S", "900"))
ANSWER_TIMEOUT_S = 120.0


async def main() -> None:
    client = GeneratorClient(sys.argv[1:], read_token())
    try:
        infos = await replicas(client)
        check_devices(infos)
        for url, info in infos.items():
            await check_rollout(url, info)
    finally:
        await client.close()


async def replicas(client: GeneratorClient) -> dict[str, Info]:
    """Wait until all replicas are ready, and return their information by URL."""
    infos: dict[str, Info] = {}
    async with asyncio.timeout(READY_TIMEOUT_S):
        while len(infos) < REPLICAS:
            await client.wait_ready(READY_TIMEOUT_S)
            infos = await client.info(ANSWER_TIMEOUT_S)
            print(f"{len(infos)} of {REPLICAS} replicas are ready", flush=True)
            await asyncio.sleep(0 if len(infos) >= REPLICAS else 5)
    return infos


def check_devices(infos: dict[str, Info]) -> None:
    """Exit with an error if two replicas use the same device. CPU cores may be shared."""
    owners: dict[str, str] = {}
    for info in infos.values():
        for device in info.devices:
            if not device.startswith("cpu:") and device in owners:
                sys.exit(f"error: {info.generator_id} and {owners[device]} share {device}, expected disjoint devices")
            owners[device] = info.generator_id
    print(f"no device is shared: {sorted(owners)}", flush=True)


async def check_rollout(url: str, info: Info) -> None:
    """Request a small rollout from one replica, and exit with an error if it contains no token."""
    client = GeneratorClient([url], read_token())
    groups: list[Group] = []
    request = RolloutRequest(
        prompts=(Prompt(token_ids=(1,)),) * 2, sampling=Sampling(n=2, max_tokens=4, ignore_eos=True)
    )
    try:
        await client.rollouts(request, groups.append, timeout_s=ANSWER_TIMEOUT_S)
    finally:
        await client.close()
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    print(f"{info.generator_id} sampled {tokens} tokens at version {info.version}", flush=True)
    if not tokens:
        sys.exit(f"error: {info.generator_id} returned no tokens, expected at least 1")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (TandemError, TimeoutError) as error:
        sys.exit(f"error: {str(error) or f'fewer than {REPLICAS} replicas were ready within {READY_TIMEOUT_S:g} s'}")
