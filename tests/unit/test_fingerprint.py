"""Two directories have the same fingerprint if and only if architecture, tokenizer and parameter table agree."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import save_file

from support.weights import tensors
from tandem_protocol.fingerprint import checkpoint_shapes, differences, fingerprint
from tandem_protocol.messages import ModelFingerprint

CONFIG = {"model_type": "llama", "hidden_size": 64, "torch_dtype": "float32", "_name_or_path": "here"}


def model(directory: Path, config: dict[str, object] = CONFIG, tokenizer: str = "{}") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(tokenizer)
    save_file(tensors(1), directory / "model.safetensors")
    return directory


def of(directory: Path) -> ModelFingerprint:
    return fingerprint(directory, checkpoint_shapes(directory))


def test_a_copy_in_another_folder_and_precision_has_the_same_fingerprint(tmp_path: Path) -> None:
    saved = dict(reversed(CONFIG.items())) | {"torch_dtype": "bfloat16", "_name_or_path": "there", "use_cache": False}
    one = of(model(tmp_path / "one"))
    two = of(model(tmp_path / "two", saved))
    assert one == two
    assert differences(one, two) == []


def test_differences_names_each_part_that_differs(tmp_path: Path) -> None:
    ours = of(model(tmp_path / "ours"))
    wider = of(model(tmp_path / "wider", CONFIG | {"hidden_size": 128}))
    retokenized = of(model(tmp_path / "retokenized", tokenizer='{"model": {}}'))
    assert differences(ours, wider) == ["config"]
    assert differences(ours, retokenized) == ["tokenizer"]
    assert differences(ours, ours.model_copy(update={"parameters": "another"})) == ["parameters"]


def test_an_unknown_digest_does_not_count_as_a_difference(tmp_path: Path) -> None:
    empty = fingerprint(tmp_path)
    assert empty == ModelFingerprint(config=None, tokenizer=None, parameters=None)
    assert differences(of(model(tmp_path / "ours")), empty) == []


def test_the_parameter_table_spans_all_shards(tmp_path: Path) -> None:
    for name, tensor in tensors(1).items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    assert checkpoint_shapes(tmp_path) == {"embed.weight": (8, 4), "norm.weight": (4,)}
    assert checkpoint_shapes(tmp_path / "absent") == {}
