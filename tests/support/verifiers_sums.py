"""A taskset of the real verifiers: sums. And a harness that asks once."""

from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.harness import Harness
from verifiers.v1.runtimes import ProgramResult


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def is_right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):  # written as verifiers documents it
        for number in range(3):
            yield SumTask(SumData(prompt=f"What is {number}+1?", answer=str(number + 1)), self.config.task)


class AsksOnce(Harness[HarnessConfig]):
    """Unlike those of verifiers, it installs nothing: they download packages when they start."""

    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any, **_: Any
    ) -> ProgramResult:
        body = {"model": ctx.model, "messages": [{"role": "user", "content": data.prompt}]}
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=120) as http:
            (await http.post("/chat/completions", json=body)).raise_for_status()
        return ProgramResult(0, "", "")


__all__ = ["AsksOnce", "Sums"]
