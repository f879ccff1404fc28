"""Use TRL's own client as a script on a GPU would, but without vLLM and a GPU. Only the use of NCCL is replaced.

python -P trl_own_client.py URL
"""

import json
import sys
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so
from trl.generation import vllm_client


def rendezvous(init_info):
    """Wait for the group as vLLM does, but only for a minute."""
    host, port, size = init_info["master_address"], init_info["master_port"], init_info["world_size"]
    return TCPStore(host, port, size, is_master=True, timeout=timedelta(seconds=60), use_libuv=False)


vllm_client.is_vllm_available = lambda *_, **__: True
vllm_client.get_ip = lambda: "127.0.0.1"
vllm_client._HAS_STATEFUL_TRAINER_ENGINE = True
vllm_client._HAS_RESET_PREFIX_CACHE_SUCCESS = True
vllm_client.open_trainer_endpoint = rendezvous

client = vllm_client.VLLMClient(sys.argv[1], group_port=0, connection_timeout=10)
said = {
    "logprobs_mode": client.get_server_info()["model_config"]["logprobs_mode"],
    "generate": client.generate([[5, 9, 13], [7, 7]], n=2, max_tokens=6),
    "chat": client.chat([[{"role": "user", "content": "1+1"}]] * 2, n=2, max_tokens=6),
}
client.reset_prefix_cache()
try:
    client.init_communicator("cuda")
except Exception as error:
    said["refused"] = str(error)
print(json.dumps(said))
