"""Calls become sequences: what continues an earlier call joins it, and every sampled token is trained once."""

from __future__ import annotations

import random

from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.sequences import Call, join
from tandem_rollout.trajectory import Sequence


def call(prompt: str, sampled: str, step: int = 1) -> Call:
    """A call whose tokens are characters. The logprob of a token is −ord/1000, so that it can be recognized."""
    completion = Completion(
        token_ids=tuple(map(ord, sampled)),
        logprobs=tuple(-ord(c) / 1000 for c in sampled),
        finish_reason="stop",
        versions=(VersionSpan(version=Version(step, 1), tokens=len(sampled)),),
    )
    return Call(tuple(map(ord, prompt)), completion)


def shown(sequence: Sequence) -> str:
    """The sequence as text, with the sampled turns in brackets."""
    text = "".join(map(chr, sequence.token_ids))
    for span in reversed(sequence.sampled):
        text = f"{text[: span.start]}[{text[span.start : span.end]}]{text[span.end :]}"
    return text


def test_a_call_that_continues_another_continues_its_sequence() -> None:
    (one,) = join([call("p", "ab", 1), call("pabq", "c", 2), call("pabqcr", "d", 2)])
    assert shown(one) == "p[ab]q[c]r[d]"
    assert one.logprobs == (0.0, -0.097, -0.098, 0.0, -0.099, 0.0, -0.1)
    assert one.steps == [-1, 1, 1, -1, 2, -1, 2]


def test_a_fork_trains_what_it_shares_once() -> None:
    trunk, fork = join([call("p", "a"), call("paq", "b"), call("par", "c")])
    assert shown(trunk) == "p[a]q[b]"
    assert shown(fork) == "par[c]"
    assert not any(fork.logprobs[:3])


def test_both_branches_of_a_fork_go_on() -> None:
    joined = join([call("p", "a"), call("paq", "b"), call("par", "c"), call("parcs", "d"), call("paqbt", "e")])
    assert [shown(one) for one in joined] == ["p[a]q[b]t[e]", "par[c]s[d]"]


def test_a_call_continues_the_longest_sequence_that_it_begins_with() -> None:
    joined = join([call("p", "a"), call("paq", "b"), call("pa", "q"), call("paqbr", "c")])
    assert [shown(one) for one in joined] == ["p[a]q[b]r[c]", "pa[q]"]


def test_two_samples_of_one_prompt_are_two_sequences() -> None:
    assert [shown(one) for one in join([call("p", "a"), call("p", "b"), call("p", "a")])] == ["p[a]", "p[b]", "p[a]"]


def test_a_rewritten_context_begins_a_sequence() -> None:
    assert [shown(one) for one in join([call("p", "ab"), call("pbq", "c")])] == ["p[ab]", "pbq[c]"]


def test_a_call_without_tokens_leaves_no_trace() -> None:
    assert join([call("p", "")]) == ()
    assert [shown(one) for one in join([call("p", "a"), call("paq", ""), call("paq", "b")])] == ["p[a]q[b]"]


def test_a_call_may_continue_a_turn() -> None:
    assert [shown(one) for one in join([call("p", "a"), call("pa", "b")])] == ["p[a][b]"]


def test_no_sampled_token_is_lost_or_trained_twice_in_random_trees() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        known = ["p"]
        calls: list[Call] = []
        for _ in range(chance.randint(1, 8)):
            prompt = chance.choice(known) + chance.choice(["", "q", "r"])
            sampled = "".join(chance.choices("ab", k=chance.randint(0, 2)))
            calls.append(call(prompt, sampled))
            known.append(prompt + sampled)
        joined = join(calls)
        assert sum(one.num_sampled for one in joined) == sum(len(c.completion.token_ids) for c in calls)
        seen = {prompt_ids + completion.token_ids for prompt_ids, completion in calls}
        for one in joined:
            assert one.token_ids in seen
            for span in one.sampled:  # the policy saw exactly what is before the turn
                turn = one.token_ids[span.start : span.end]
                assert any((one.token_ids[: span.start], turn) == (c.prompt_ids, c.completion.token_ids) for c in calls)
