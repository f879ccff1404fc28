"""The versions that were published, in `transformers`. They say what a generator has to sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.generators import Generator
from support.reference_policy import ReferencePolicy
from tandem_protocol.messages import Completion, Prompt
from tandem_protocol.store import WeightStore
from tandem_protocol.version import BASE, Version

PROMPTS = ([5, 9, 13], [7] * 20, [3, 60, 41, 22, 8])
TOLERANCE = 2e-4
"""Bound of the mean |generator logprob - logprob in `transformers`|, in nats, in float32."""


@dataclass(frozen=True)
class Answer:
    """How a generator's completions compare with the version that they say sampled them."""

    versions: frozenset[Version]
    """What the completions say."""
    is_greedy: bool
    """Whether all greedy tokens are the most likely ones."""
    mismatch: float
    """Mean |generator logprob - logprob in `transformers`| of sampled tokens, in nats."""

    def is_of(self, version: Version) -> bool:
        """Whether the generator samples from `version`, and from no other weights."""
        return self.versions == {version} and self.is_greedy and self.mismatch <= TOLERANCE


def file_of(folder: Path, version: Version) -> Path:
    return folder / f"{version}.safetensors"


def save(folder: Path, version: Version, tensors: Mapping[str, Tensor]) -> None:
    """Note what a version has. Call it before the version is published."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file_of(folder, version))


class PublishedPolicies:
    """The versions that were saved in `folder`, and the model before them."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._policy = ReferencePolicy(model_dir, WeightStore(folder))
        save(folder, BASE, self._policy.tensors())

    def of(self, version: Version) -> ReferencePolicy:
        """A version in float32. Valid until the next call."""
        missing, unexpected = self._policy.model.load_state_dict(load_file(file_of(self.folder, version)), strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, "it may be tied"
        return self._policy

    def ask(self, generator: Generator) -> Answer:
        """Let a generator sample, and compare every token with the version that the completion names."""
        prompts = [Prompt(token_ids=prompt) for prompt in PROMPTS]
        greedy = generator.rollouts(*prompts, max_tokens=24, temperature=0.0, ignore_eos=True)
        sampled = generator.rollouts(*prompts, n=4, max_tokens=24, ignore_eos=True)
        versions = {span.version for group in (*greedy, *sampled) for one in group.completions for span in one.versions}
        pairs = list(zip(PROMPTS, greedy, strict=True))
        differences = [
            (self._logprobs(prompt, completion) - torch.tensor(completion.logprobs)).abs()
            for prompt, group in zip(PROMPTS, sampled, strict=True)
            for completion in group.completions
        ]
        return Answer(
            frozenset(versions),
            all(self._is_greedy(prompt, group.completions[0]) for prompt, group in pairs),
            float(torch.cat(differences).mean()),
        )

    def distance(self, one: Version, other: Version) -> float:
        """Mean difference of two versions' logprobs of the same tokens, in nats."""
        tokens = [token for prompt in PROMPTS for token in prompt]
        first = self.of(one).token_logprobs(tokens, 1.0)
        return float((first - self.of(other).token_logprobs(tokens, 1.0)).abs().mean())

    def _logprobs(self, prompt: Sequence[int], completion: Completion) -> Tensor:
        """The logprobs [T] under the versions that the completion names."""
        return self._by_version(completion, lambda policy: policy.logprobs([*prompt], completion, 1.0))

    def _is_greedy(self, prompt: Sequence[int], completion: Completion) -> bool:
        sequence = torch.tensor([[*prompt, *completion.token_ids]])
        best = self._by_version(
            completion, lambda policy: policy.model(sequence).logits[0, len(prompt) - 1 : -1].argmax(-1)
        )
        return best.tolist() == list(completion.token_ids)

    @torch.no_grad()
    def _by_version(self, completion: Completion, compute: Callable[[ReferencePolicy], Tensor]) -> Tensor:
        """Join the values [T] of each version for the tokens that it sampled."""
        parts: list[Tensor] = []
        for span in completion.versions:
            start = sum(map(len, parts))
            parts.append(compute(self.of(span.version))[start : start + span.tokens])
        return torch.cat(parts)
