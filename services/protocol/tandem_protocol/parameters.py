"""Which tensors a version of a model consists of: the one rule by which trainer and generator derive their tables.

The rule is about names, so that it needs no torch: tensors pass through it as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Name in a Hugging Face checkpoint → shape."""


def own_tensors(model: Any) -> dict[str, Any]:
    """The tensors of a `transformers` model that a version holds, under the model's own names.

    A tensor that is tied to another one (`lm_head` to the embeddings) is left out, as are an adapter's. What an adapter
    has wrapped has its own name: `q_proj.base_layer.weight` is `q_proj.weight`.

    `transformers.core_model_loading.revert_weight_conversion` turns these names into those of checkpoints.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def describe_differences(trainer: Shapes, generator: Shapes) -> str:
    """`2 parameters differ: norm.weight: trainer (8,), generator (4,); head.weight: trainer (8, 4), generator none`.

    The first three, those that both have before the others; empty where there are none.
    """
    names = [name for name in sorted(trainer.keys() | generator.keys()) if trainer.get(name) != generator.get(name)]
    if not names:
        return ""
    shared_first = sorted(names, key=lambda name: name not in trainer or name not in generator)
    parts = [
        f"{name}: trainer {trainer.get(name, 'none')}, generator {generator.get(name, 'none')}"
        for name in shared_first[:3]
    ]
    return f"{len(names)} parameter{'s' * (len(names) > 1)} differ{'s' * (len(names) == 1)}: {'; '.join(parts)}"
