"""The ranks write each tensor of the model once, under its checkpoint name and in the requested dtype."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from support.architectures import tiny_config, tiny_model
from support.models import make_tiny_model
from tandem_protocol.manifest import digest_file, read_header
from tandem_trainer.learner import safetensors_file, shards
from tandem_trainer.learner.safetensors_file import write_files, write_safetensors
from tandem_trainer.learner.shards import MAX_FILES, model_table, model_tensors, part_files, partition, write_part


def _model(directory: Path, *, tied: bool = True) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(make_tiny_model(directory, tied=tied))


def _written(model: PreTrainedModel, directory: Path, dtype: torch.dtype, ranks: int = 1) -> dict[str, Tensor]:
    table = model_table(model, dtype)
    digests: dict[str, str] = {}
    for rank in range(ranks):
        tensors = model_tensors(model, dtype)
        digests |= write_part(directory, table, tensors, rank=rank, ranks=ranks, max_files=MAX_FILES)
    assert digests == {path.name: digest_file(path) for path in directory.iterdir()}
    assert len({entry.name for path in directory.iterdir() for entry in read_header(path)}) == len(table)
    return {name: tensor for path in directory.iterdir() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_written_names_and_values_equal_those_of_the_checkpoint(tmp_path: Path, tied: bool, ranks: int):
    model = _model(tmp_path / "model", tied=tied)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "written").mkdir()
    written = _written(model, tmp_path / "written", torch.float32, ranks)
    assert written.keys() == saved.keys()
    assert ("lm_head.weight" in written) is not tied
    assert all(torch.equal(written[name], saved[name]) for name in saved)


@pytest.mark.parametrize("family", ["exaone_moe", "ernie4_5_moe", "laguna", "lfm2_moe"])
def test_what_corrects_the_choice_of_experts_is_not_rounded(family: str, tmp_path: Path):
    model = tiny_model(tiny_config(family))
    written = _written(model, tmp_path, torch.bfloat16)
    corrections = {
        name: tensor for name, tensor in written.items() if name.endswith(("correction_bias", "expert_bias"))
    }
    own = {n: t for n, t in model.state_dict().items() if n.endswith(("correction_bias", "expert_bias"))}
    assert own
    assert [t.tolist() for t in corrections.values()] == [t.tolist() for t in own.values()]
    assert any(tensor.bfloat16().float().tolist() != tensor.tolist() for tensor in own.values())
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_floats_get_the_requested_dtype_and_other_tensors_keep_theirs(tmp_path: Path):
    model = _model(tmp_path / "model")
    model.register_buffer("odd", torch.tensor([True, False, True]))
    model.register_buffer("count", torch.tensor(3))
    (tmp_path / "written").mkdir()
    written = _written(model, tmp_path / "written", torch.bfloat16)
    assert torch.equal(written["odd"], model.odd)
    assert torch.equal(written["count"], model.count)
    assert torch.equal(written["model.norm.weight"], model.model.norm.weight.bfloat16())
    assert {written[name].dtype for name in written if name not in ("odd", "count")} == {torch.bfloat16}


def test_parts_have_similar_sizes_and_may_be_empty(tmp_path: Path):
    table = {str(size): torch.empty(size, device="meta") for size in (5, 1, 3, 2)}
    assert [list(part) for part in partition(table, 2)] == [["5", "1"], ["3", "2"]]
    assert write_part(tmp_path, table, [("1", torch.zeros(1))], rank=4, ranks=5) == {}
    assert list(tmp_path.iterdir()) == []


def test_full_disk_raises_an_os_error():
    with pytest.raises(OSError, match="No space left") as error:
        write_safetensors(Path("/dev/full"), {"a": torch.empty(4, device="meta")}, [torch.zeros(4)])
    assert error.value.errno == errno.ENOSPC


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MIN_FILE_BYTES", 1000)


@pytest.mark.usefixtures("many_files")
def test_a_rank_writes_several_files_if_they_are_large(tmp_path: Path):
    model = _model(tmp_path / "model")
    (tmp_path / "written").mkdir()
    written = _written(model, tmp_path / "written", torch.float32, ranks=2)
    files = sorted(path.name for path in (tmp_path / "written").iterdir())
    assert files == [f"model-{i:05d}-of-{2 * MAX_FILES:05d}.safetensors" for i in range(1, 2 * MAX_FILES + 1)]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[name], saved[name]) for name in saved)


@pytest.mark.usefixtures("many_files")
def test_a_file_that_cannot_be_written_raises_its_error_and_all_tensors_are_taken(tmp_path: Path):
    """Other ranks gather with this one, so it takes all tensors. The other files must not wait for room either."""
    model = _model(tmp_path / "model")
    table = model_table(model, torch.float32)
    files = part_files(table, rank=0, ranks=1)
    (tmp_path / next(iter(files))).mkdir()
    taken = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_tensors(model, torch.float32):
            taken.append(name)
            yield name, tensor

    with pytest.raises(IsADirectoryError):
        write_files(tmp_path, files, tensors())
    assert taken == list(table)


@pytest.mark.usefixtures("many_files")
def test_few_tensors_are_in_memory_at_once(tmp_path: Path):
    table = {str(i): torch.empty(300, device="meta") for i in range(40)}
    files = part_files(table, rank=0, ranks=1)
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name in table:
            tensor = torch.full((300,), float(name))
            made.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in made))
            yield name, tensor

    write_files(tmp_path, files, tensors())
    assert most <= 2 * len(files)
    assert load_file(tmp_path / next(iter(files)))


def test_tensors_of_other_ranks_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    may_write, most = threading.Event(), 0
    made: list[weakref.ref[Tensor]] = []
    data_of = safetensors_file.data_of

    def slow(tensor: Tensor) -> memoryview:
        assert may_write.wait(60)
        return data_of(tensor)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name in ("own", "another rank's", "another rank's too"):
            tensor = torch.zeros(3)
            made.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in made))
            yield name, tensor
            del tensor
        may_write.set()

    monkeypatch.setattr(safetensors_file, "data_of", slow)
    write_files(tmp_path, {"part.safetensors": {"own": torch.empty(3, device="meta")}}, tensors())
    assert most == 2, "the one that is being written, and the newest"


def test_a_model_is_converted_by_transformers_only_once_if_nothing_but_names_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, calls = _model(tmp_path / "model"), []
    revert = vars(shards)["revert_weight_conversion"]

    def counted(*arguments: object) -> dict[str, Tensor]:
        calls.append(arguments)
        return revert(*arguments)

    monkeypatch.setattr(shards, "revert_weight_conversion", counted)
    table = model_table(model, torch.float32)
    assert calls
    calls.clear()
    assert dict(model_tensors(model, torch.float32)).keys() == table.keys()
    assert calls == []
    model.register_buffer("odd", torch.tensor([True]))
    assert "odd" in model_table(model, torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "gpt_neox"])
def test_tensors_have_the_names_and_values_that_transformers_saves(family: str, tmp_path: Path):
    model = tiny_model(tiny_config(family))
    (tmp_path / "written").mkdir()
    model.save_pretrained(tmp_path / "saved")
    for _ in range(2):
        written = _written(model, tmp_path / "written", torch.float32)
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert written.keys() == saved.keys()
        assert all(torch.equal(written[name], saved[name]) for name in saved)
        for path in (tmp_path / "written").iterdir():
            path.unlink()
