"""The script that `helm test` runs: every replica is ready, answers a rollout, and shares no device with another.

Then it looks at the run: the trainer finishes a step, or has finished the run. The generators know it by the version
that they serve. The trainer checks the devices, too: it exits if a generator uses one of its own.
"""

import asyncio
import os
import sys

from tandem_protocol.config import read_token
from tandem_protocol.errors import TandemError
from tandem_protocol.messages import Group, Info, Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

REPLICAS = int(os.environ.get("REPLICAS", "1"))
READY_TIMEOUT_S = float(os.environ.get("READY_TIMEOUT_S", "900"))
STEP_TIMEOUT_S = float(os.environ.get("STEP_TIMEOUT_S", "600"))
MAX_STEPS = int(os.environ.get("MAX_STEPS", "0"))
ANSWER_TIMEOUT_S = 120.0
POLL_S = 2.0


async def main() -> None:
    client = GeneratorClient(sys.argv[1:], read_token())
    try:
        infos = await replicas(client)
        check_devices(infos)
        for url, info in infos.items():
            await check_rollout(url, info)
        await check_run(client)
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


async def check_run(client: GeneratorClient) -> None:
    """Wait until the trainer has finished a step, or the run. Exit with an error if it does not in time."""
    before = now = await newest(client)
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            while now.step <= before.step and now.step < MAX_STEPS:
                await asyncio.sleep(POLL_S)
                now = await newest(client)
                if now.attempt > before.attempt and now.step < before.step:
                    before = now  # the trainer has started again, from an earlier checkpoint
    except TimeoutError:
        sys.exit(
            f"error: the trainer finished no step within {STEP_TIMEOUT_S:g} s (test.stepMinutes); the generators serve "
            f"version {now} of a run of {MAX_STEPS} steps. Fix: read the log of the trainer's pod, or describe it"
        )
    print(f"the run is at step {now.step} of {MAX_STEPS}", flush=True)


async def newest(client: GeneratorClient) -> Version:
    return max(info.version for info in (await client.info(ANSWER_TIMEOUT_S)).values())


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (TandemError, TimeoutError) as error:
        sys.exit(f"error: {str(error) or f'fewer than {REPLICAS} replicas were ready within {READY_TIMEOUT_S:g} s'}")
