"""Play tasks of the real verifiers. A program, because verifiers needs other versions of packages than .venv has."""

from __future__ import annotations

import asyncio

from support import agents
from support.episodes import Policy, Row
from tandem_rollout.adapters.verifiers import VerifiersAgent
from tandem_rollout.proxy import Proxy

SETTINGS = {
    "taskset": {"id": "verifiers-sums"},
    "agent": {"harness": {"id": "verifiers-sums"}, "runtime": {"type": "subprocess"}},
}


async def main() -> None:
    run = VerifiersAgent(SETTINGS)
    proxy = Proxy("policy")
    async with proxy.serve():
        for says, reward in (("It is 2.", 2.0), ("No idea.", 0.0)):
            policy = Policy(says)
            one = await agents.agents(run, proxy, timeout_s=300).play(Row("Q", columns={"task": 1}), policy)
            assert (one.reason, one.status, one.reward, one.turns) == (None, "finished", reward, 1), one
            assert one.messages[0] == {"role": "user", "content": "What is 1+1?"}
            agents.assert_trains_what_the_policy_said(one, policy)


asyncio.run(main())
