"""After a load that breaks at any point, loading the old version again restores it byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.family_pool import ENV, ROOT

pytestmark = pytest.mark.vllm

TENSORS = {"qwen2_moe": 55, "llama": 21}
"""Family → number of tensors in a version of its tiny model."""
PARTS = {"initialize_online_processing", "_layerwise_process", "_place_kernel_tensors", "_finalize_attention_layer"}
"""Functions of vLLM that a layerwise reload calls."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "support.load_breaks", str(tmp_path_factory.mktemp("breaks")), *TENSORS],
        env={**os.environ, **ENV, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"family"')]
    assert lines, done.stderr[-3000:]
    return lines


@pytest.fixture
def breaks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "point" in line]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("right", ""),
        ("without safetensors", ""),
        ("without new kernels", "cannot be switched while it is loaded"),
        ("in place", "of 4 of its tensors (model.layers.0.mlp.experts.routed_experts.w13_weight, "),
        ("without tensor 0.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj"),
        ("without tensor 1.mlp.experts.2.up_proj", "model.layers.1.mlp.experts.routed_experts"),
    ],
)
def test_the_rehearsal_at_the_start_finds_every_wrong_way_to_load_experts(
    way: str, words: str, lines: list[dict[str, Any]]
) -> None:
    (said,) = [line["result"] for line in lines if line.get("way") == way and line["family"] == "qwen2_moe"]
    assert words in said
    assert bool(said) is bool(words)


def test_a_shared_embedding_of_a_padded_vocabulary_may_be_in_the_files_once_or_twice(
    lines: list[dict[str, Any]],
) -> None:
    assert [line["result"] for line in lines if line["family"] == "mixtral, tied"] == [""]


def test_every_break_is_restored(breaks: list[dict[str, Any]]) -> None:
    assert [line for line in breaks if line["result"] != "restored"] == []


@pytest.mark.parametrize("family", TENSORS)
def test_a_load_breaks_at_each_of_its_tensors(family: str, breaks: list[dict[str, Any]]) -> None:
    points = [line["point"] for line in breaks if line["family"] == family]
    assert [point for point in points if point[0] == "tensor"] == [["tensor", call] for call in range(TENSORS[family])]


def test_a_load_of_experts_breaks_in_each_part_of_vllm(breaks: list[dict[str, Any]]) -> None:
    parts = {line["point"][0] for line in breaks if line["family"] == "qwen2_moe"}
    assert parts >= {*PARTS, "process of UnquantizedFusedMoEMethod", "process of UnquantizedLinearMethod"}
