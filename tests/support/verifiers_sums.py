"""A taskset of the real verifiers: sums."""

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def is_right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):  # type: ignore[no-untyped-def]  # written as verifiers documents it
        for number in range(3):
            yield SumTask(SumData(prompt=f"What is {number}+1?", answer=str(number + 1)), self.config.task)


__all__ = ["Sums"]
