"""A policy in `transformers`, published as a trainer does. Generators are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.messages import Completion
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version


class ReferencePolicy:
    """A model that can be changed, published, and sampled to get the expected answers of a generator."""

    def __init__(self, model_dir: Path, store: WeightStore) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir)
        self.model_dir = model_dir
        self.store = store

    def change(self, seed: int) -> None:
        """Add noise to every parameter, large enough that greedy tokens differ."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def publish(self, version: Version, tensors: dict[str, torch.Tensor] | None = None) -> str:
        """Commit the policy (or `tensors`) as `version`, and return the digest of its manifest."""
        tensors = tensors or self.tensors()
        (self.store.root / "versions").mkdir(parents=True, exist_ok=True)
        with self.store.staging(version, needs_bytes=1 << 20) as staged:
            for number, (name, tensor) in enumerate(tensors.items()):
                save_file({name: tensor}, staged / f"shard-{number:05d}.safetensors")
            return self.store.commit(staged, version, run="test", fingerprint=fingerprint(self.model_dir))[1]

    @torch.no_grad()
    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        sequence = list(prompt)
        for _ in range(tokens):
            sequence.append(int(self.model(torch.tensor([sequence])).logits[0, -1].argmax()))
        return sequence[len(prompt) :]

    def logprobs(self, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
        """Return the log-probability [T] of each token of the completion at `temperature`."""
        return self.token_logprobs([*prompt, *completion.token_ids], temperature)[len(prompt) - 1 :]

    @torch.no_grad()
    def token_logprobs(self, token_ids: Sequence[int], temperature: float) -> torch.Tensor:
        """Return the log-probability [S - 1] of each token but the first, given all tokens before it."""
        sequence_1S = torch.tensor([token_ids])
        logprobs_SV = torch.log_softmax(self.model(sequence_1S).logits[0, :-1] / temperature, dim=-1)
        return logprobs_SV.gather(1, sequence_1S[0, 1:, None])[:, 0]
