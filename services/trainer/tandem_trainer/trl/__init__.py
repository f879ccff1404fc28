"""Run a TRL script on Tandem's generators, without a change to the script.

    accelerate launch -m tandem_trainer.trl train.py --learning_rate 1e-6

Or with one line in the script, before it makes a trainer:

    from tandem_trainer import trl
    trl.use()

TRL's trainers with `use_vllm=True, vllm_mode="server"` then sample with `POST /rollouts` and send their weights through
the weight store. Neither NCCL nor vLLM is needed beside the trainer.
"""

from pathlib import Path

__all__ = ["use"]


def use(weights_dir: str | Path | None = None, *, config: Path | None = None) -> None:
    """From now on, TRL's trainers with `use_vllm=True, vllm_mode="server"` use Tandem's generators.

    Args:
        weights_dir: Directory of the weight store. None: `TANDEM__SHARED__WEIGHTS_DIR`, or `weights`.
        config: YAML file with the sections `shared` and `trainer`. None: no file.

    Raises:
        ConfigError: TRL is missing, this version of it is not supported, or an environment variable is invalid.
    """
    from . import takeover  # imports torch, which takes seconds that `--help` does not need

    takeover.use(weights_dir, config=config)
