"""Decide whether the learner computes a prompt once for several rows, and check that this changes nothing.

Tensor names end in their shape: B rows, S all tokens of a row, T its tokens behind the prompt, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tandem_protocol.config.learning import LearnerConfig
from tandem_protocol.problems import one_line

from ..batch import SharedPrompts
from .logprobs import TokenLogprobs
from .packed_prompts import why_not_packed

TOLERANCE = 1e-3
"""Largest difference of logprobs in nats, and of gradients relative to the largest one, that rounding explains."""
PROMPT, REST = 7, 9
"""Tokens of a short prompt, and of a short rest of a row. They are odd, because some models group tokens by twos."""
OPERATIONS_ON_CPU = 1e14
"""Operations that the check may take on a CPU: one to two minutes on a server. Models of up to 170 billion parameters
take fewer, unless they have a sliding window."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
"""Keys of a model's configuration for the number of tokens that the attention of a layer sees."""


def why_unshared(
    policy: TokenLogprobs, config: LearnerConfig, max_tokens: int, *, most_operations: float | None = None
) -> str | None:
    """Return why each row has to compute its own prompt, or None if prompts can be computed once.

    To find out, the policy computes some rows on the device that it is on.

    Args:
        max_tokens: Tokens of a micro-batch.
        most_operations: How many operations this may take. None: any number.
    """
    if config.shared_prompts == "never":
        return "trainer.learner.shared_prompts is never"
    if (window := _window(policy)) and window + PROMPT + 2 * REST > max_tokens:
        return (
            f"rows that are longer than the sliding window of {window} tokens need a micro-batch of "
            f"{window + PROMPT + 2 * REST}, but one has {max_tokens}. So the start cannot check that sharing changes "
            "nothing. Fix: raise trainer.learner.max_tokens_per_micro_batch"
        )
    if policy.packs_prompts and (reason := why_not_packed(policy.model)):
        key = "gradient_checkpointing" if config.gradient_checkpointing else "parallelism: fsdp2"
        return f"with trainer.learner.{key}, {reason}"
    tokens = 2 * sum(rows * (prompt + rest) for rows, prompt, rest in _cases(window))
    operations = 6 * tokens * sum(parameter.numel() for parameter in policy.parameters())  # forward and backward
    if most_operations is not None and operations > most_operations:
        return (
            f"the start would have to check rows that are longer than the sliding window of {window} tokens, on the "
            "CPU, because the model is not sharded yet. That would take minutes"
        )
    return difference_when_shared(policy)


def difference_when_shared(policy: TokenLogprobs) -> str | None:
    """Compare rows that share a prompt with the same rows on their own: their logprobs and gradients.

    Rows longer than a sliding window are compared too, with a short and with a long prompt. So are two rows that are
    longer than it together: a window must not count the tokens of the other row.

    Returns:
        What differs, or why the model cannot share prompts. None if nothing differs.
    """
    name = type(policy.model).__name__
    try:
        for rows, prompt, rest in _cases(_window(policy)):
            difference = _difference(policy, rows, prompt, rest)
            if not difference <= TOLERANCE:  # NaN too
                return f"logprobs or gradients of {name} would differ by {difference:.2g}"
    except Exception as error:  # the model's own code may raise anything
        return f"{name} cannot compute a prompt once for several rows: {one_line(error)}"
    return None


def _cases(window: int | None) -> list[tuple[int, int, int]]:
    """Return numbers of rows, with the tokens of their prompt and of the rest of each row."""
    beyond = [(2, PROMPT, window // 2 + REST), (1, PROMPT, window + REST), (2, window + PROMPT, REST)] if window else []
    return [(3, PROMPT, REST), *beyond]


def _window(policy: TokenLogprobs) -> int | None:
    """The longest sliding window, in tokens. None if there is none that a row can be longer than."""
    config = policy.model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    sizes = [size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and 0 < size < longest]
    return max(sizes, default=None)


def _difference(policy: TokenLogprobs, rows: int, prompt: int, rest: int) -> float:
    """Compare the rows of one group."""
    device = policy.model.device
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    position_S = torch.arange(prompt + rest, device=device)
    row_B1 = torch.arange(rows, device=device)[:, None]
    token_ids_BS = (position_S + row_B1 * (position_S >= prompt)) % vocabulary
    prompt_B = torch.zeros_like(row_B1[:, 0])
    shared = SharedPrompts(token_ids_BS[:1, :prompt], prompt_B, is_first=True, is_last=True)
    weights_BT = torch.arange(1, rows * rest + 1, device=device).sin().view(rows, rest)
    # One at a time, since together they may be longer than a micro-batch.
    own = [_computed(policy, token_ids_BS[[row]], weights_BT[[row]], None) for row in range(rows)]
    own_BT, own_SH = (
        torch.cat([logprobs for logprobs, _ in own]),
        torch.stack([gradients for _, gradients in own]).sum(0),
    )
    shared_BT, shared_SH = _computed(policy, token_ids_BS, weights_BT, shared)
    of_logprobs = (shared_BT - own_BT).abs().max()
    of_gradients = (shared_SH - own_SH).abs().max() / own_SH.abs().max()
    return max(of_logprobs.item(), of_gradients.item())


def _computed(
    policy: TokenLogprobs, token_ids_BS: Tensor, weights_BT: Tensor, shared: SharedPrompts | None
) -> tuple[Tensor, Tensor]:
    """Return the logprobs of the last T tokens of each row, and the gradients of the embedded tokens [S, H].

    The gradients are those of the sum of logprobs × weights. Those of the parameters are not computed, because they
    need as much memory as the model.
    """
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    hook = policy.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            prompt = token_ids_BS.shape[1] - weights_BT.shape[1]
            starts_B = torch.full_like(token_ids_BS[:, 0], prompt)
            logprobs_BT, _ = policy(token_ids_BS, starts_B, torch.ones_like(weights_BT).bool(), shared)
            gradients = torch.autograd.grad((weights_BT * logprobs_BT).sum(), embedded)
            if shared is not None and policy.packs_prompts:
                prompt_LH, rests_NH = gradients[0].squeeze(0).tensor_split([prompt])
                gradients = (prompt_LH[None], rests_NH.view(len(token_ids_BS), -1, rests_NH.shape[1]))
    finally:
        hook.remove()
    return logprobs_BT.detach(), torch.cat([gradient.sum(0) for gradient in gradients])
