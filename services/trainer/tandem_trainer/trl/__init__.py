"""Run a TRL script on Tandem's generators, without a change to the script.

    accelerate launch -m tandem_trainer.trl train.py --learning_rate 1e-6

Or with one line in the script, before it makes a trainer:

    from tandem_trainer.trl import use
    use()

TRL's trainers with `use_vllm=True, vllm_mode="server"` then sample with `POST /rollouts` and send their weights through
the weight store. Neither NCCL nor vLLM is needed beside the trainer.
"""

from .takeover import use

__all__ = ["use"]
