"""Run a TRL script with TRL's own client, but without vLLM and a GPU beside it: weights are not sent.

python -P trl_without_nccl.py SCRIPT ARGUMENTS
"""

import runpy
import sys
from types import SimpleNamespace

from trl.generation import vllm_client, vllm_generation

for module in (vllm_client, vllm_generation):
    module.is_vllm_available = lambda *_, **__: True
vllm_generation.SamplingParams = SimpleNamespace
client = vllm_client.VLLMClient
for name in ("init_communicator", "update_named_params", "close_communicator"):
    setattr(client, name, lambda *_, **__: None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
