"""Play episodes on a server of the real OpenEnv, whose URL is the argument."""

from __future__ import annotations

import asyncio
import sys

from support.environment_classes import play, said, started
from support.episodes import Row, called
from tandem_rollout.adapters.openenv import OpenEnv


async def main(url: str) -> None:
    environments = await started(OpenEnv(url), timeout_s=60)
    ((tool, parameters),) = [(s["function"]["name"], s["function"]["parameters"]) for s in environments.schemas]
    assert (tool, list(parameters["properties"]), parameters["required"]) == ("act", ["number"], ["number"])
    texts = [called("act", number=3), called("act", number="x"), called("act", number=-1), called("act", number=7)]
    group = await play(environments, *texts, "Ok.", row=Row("Play. ", columns={"secret": 7}), size=4)
    assert [(t.status, t.rewards) for t in group.trajectories] == [("finished", {"OpenEnv": 0.5})] * 4
    answers = [content for role, content in said(group.trajectories[0]) if role == "tool"]
    assert [answers[0], answers[3]] == ['{"text": "no"}', '{"text": "right"}']
    assert ["VALIDATION_ERROR" in answers[1], "too small" in answers[2]] == [True, True]
    await environments.close()


asyncio.run(main(sys.argv[1]))
