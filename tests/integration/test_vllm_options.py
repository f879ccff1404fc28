"""Options that Tandem sets itself are refused in every spelling, because vLLM's own parser resolves the spelling."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from support.models import make_tiny_model
from tandem_generator.options import parse
from tandem_protocol.config import ConfigError

pytestmark = pytest.mark.vllm


def read(*words: str) -> list[str]:
    """Let vLLM parse the command line. Return the arguments that were passed on to vLLM."""
    from tandem_generator.vllm_server import parse_engine_args

    options = parse(["--model", "m", *words])
    parse_engine_args(options.settings, options.engine_args)
    return options.engine_args


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["-asc", "2"], "api_server_count"),
        (["--api-server", "2"], "api_server_count"),
        (["--logprobs-m", "raw_logprobs"], "logprobs_mode"),
        (["--tensor-par", "2"], "tensor_parallel_size"),
        (["--generation-conf=folder"], "generation_config"),
        (["--generation-config", "folder"], "generation_config"),
        (["--middle", "a.b"], "middleware"),
        (["-sc.rejection_sample_method", "synthetic"], "rejection_sample_method"),
        (["--speculative-config", '{"rejection_sample_method": "synthetic"}'], "rejection_sample_method"),
        (["word"], "'word'"),
    ],
)
def test_short_forms_and_abbreviations_of_reserved_options_are_refused(words: list[str], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        read(*words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--absent", "3"], "unrecognized arguments: --absent"),
        (["--max-num-seqs", "many"], "invalid int value: 'many'"),
        (["--generator.vllm.disable_log_stats=false"], "unrecognized arguments: --no-disable-log-stats"),
    ],
)
def test_an_option_that_vllm_refuses_is_a_user_error_in_one_line(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"vLLM refuses its options: .*{problem}") as caught:
        read(*words)
    assert len(str(caught.value).splitlines()) == 1


def test_lists_and_mappings_are_passed_on_to_vllm() -> None:
    words = read("--generator.vllm", "{cudagraph_capture_sizes: [1, 2], compilation_config: {mode: 0}}", "-O2")
    assert words == ["--cudagraph-capture-sizes", "1", "2", "--compilation-config", '{"mode": 0}', "-O2"]


@pytest.mark.parametrize(("log", "bars"), [("json", False), ("text", True), ("", True)])
def test_vllm_draws_no_progress_bars_into_a_log_of_json(log: str, bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem_generator.vllm_server import parse_engine_args

    monkeypatch.setenv("TANDEM_LOG", log)
    options = parse(["--model", "m"])
    assert parse_engine_args(options.settings, options.engine_args).use_tqdm_on_load is bars


def test_a_port_in_use_is_reported_before_the_engine_starts(tmp_path: Path) -> None:
    from tandem_generator.vllm_server import serve_vllm

    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = parse(["--model", str(make_tiny_model(tmp_path / "model")), "--port", str(taken.getsockname()[1])])
        with pytest.raises(ConfigError, match=r"^generator\.port \d+ on 127.0.0.1 cannot be listened on: it is in use"):
            serve_vllm(options.settings, options.engine_args)
