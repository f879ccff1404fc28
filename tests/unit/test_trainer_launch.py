"""The environment sets the number of trainer processes and nodes. Wrong values are refused with a message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tandem_trainer.launch import refuse_several_nodes, trainer_command

TRAINER = ["-m", "tandem_trainer", "--config", "c.yaml"]


def command(**env: str) -> list[str]:
    return trainer_command({f"TANDEM_TRAINER_{name}": value for name, value in env.items()}, TRAINER[2:])[1:]


def test_one_process_runs_the_trainer_without_accelerate():
    assert command() == command(PROCESSES="1") == command(PROCESSES="") == TRAINER


def test_processes_of_several_nodes_meet_at_the_rendezvous():
    words = command(PROCESSES="4", NODES="2", NODE_RANK="1", RENDEZVOUS="trainer-0.trainer:29500")
    assert words[:3] == ["-m", "accelerate.commands.launch", "--multi_gpu"]
    assert words[-4:] == TRAINER
    options = dict(zip(words[3:-4:2], words[4:-4:2], strict=True))
    assert options["--num_processes"] == "8"
    assert (options["--num_machines"], options["--machine_rank"]) == ("2", "1")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("trainer-0.trainer", "29500")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"PROCESSES": "0"}, "PROCESSES=0, expected an integer of at least 1"),
        ({"PROCESSES": "two"}, "PROCESSES=two"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 of TANDEM_TRAINER_NODES=2, expected 0 to 1"),
        ({"NODES": "2", "RENDEZVOUS": "trainer-0"}, "RENDEZVOUS=trainer-0, expected host:port"),
        ({"NODES": "2", "RENDEZVOUS": "trainer-0:65536"}, "RENDEZVOUS=trainer-0:65536, expected host:port"),
        ({"NODES": "2", "RENDEZVOUS": "trainer-0:0"}, "RENDEZVOUS=trainer-0:0, expected host:port"),
        ({"NODES": "2"}, "RENDEZVOUS=, expected host:port"),
    ],
)
def test_a_wrong_value_is_refused(env: dict[str, str], expected: str):
    with pytest.raises(ValueError, match=expected):
        command(**env)


def test_processes_of_one_node_meet_at_a_free_port():
    words = command(PROCESSES="2")
    assert words[words.index("--main_process_port") + 1] == "0"


def test_a_rendezvous_port_in_use_is_refused_on_the_node_that_listens():
    with socket.create_server(("", 0)) as taken:
        meeting = f"trainer-0:{taken.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=f"{meeting[10:]} cannot be listened on: it is in use by process {os.getpid()} "
        ):
            command(NODES="2", RENDEZVOUS=meeting)
        assert command(NODES="2", NODE_RANK="1", RENDEZVOUS=meeting)


@pytest.mark.parametrize("name", ["RETRIES", "END_FILE"])
def test_what_one_machine_does_for_a_run_is_refused_with_several_nodes(name: str):
    one = {f"TANDEM_TRAINER_{name}": "5", "TANDEM_TRAINER_NODES": "1"}
    refuse_several_nodes(one)
    refuse_several_nodes(one | {"TANDEM_TRAINER_NODES": "2", f"TANDEM_TRAINER_{name}": ""})
    with pytest.raises(ValueError, match=rf"^got TANDEM_TRAINER_{name}=5 with TANDEM_TRAINER_NODES=2.*Fix: unset it"):
        refuse_several_nodes(one | {"TANDEM_TRAINER_NODES": "2"})


def test_torchs_launcher_prints_no_traceback_when_another_node_has_ended():
    """Neither a module that was imported before its launcher was silenced, nor one that is imported later."""
    program = """
from tandem_trainer import several
from torch.distributed.elastic.multiprocessing import api as earlier
several.quiet()
from torch.distributed.elastic.agent.server import api as later
for module in (earlier, later):
    try:
        raise ConnectionError("reset by peer")
    except ConnectionError:
        module.logger.exception("Error waiting on exit barrier")
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout + done.stderr == ""
