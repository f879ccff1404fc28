"""Parameter tables: which tensors of a model belong to a version.

Trainer and generator apply the same rule. It looks only at names, so this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Name in a Hugging Face checkpoint → shape."""


def own_tensors(model: Any) -> dict[str, Any]:
    """Return the tensors of a `transformers` model that belong to a version.

    Tied tensors, such as an `lm_head` that shares the embeddings, are left out, and so are an adapter's matrices. A
    layer that is wrapped by an adapter keeps its original name: `q_proj.base_layer.weight` becomes `q_proj.weight`.

    Args:
        model: A `transformers` model, with or without a peft adapter.

    Returns:
        Name → tensor, with the names of the model's modules. To get the names in a checkpoint, pass the result through
        `transformers.core_model_loading.revert_weight_conversion`.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def describe_differences(trainer: Shapes, generator: Shapes) -> str:
    """Describe how two parameter tables differ, in one line.

    Example: `2 parameters differ: norm.weight: trainer (8,), generator (4,); head.weight: trainer (8, 4), generator
    none`. At most three parameters are listed. Those that exist on both sides come first.

    Args:
        trainer: Parameter table of the trainer.
        generator: Parameter table of the generator.

    Returns:
        The description. Empty if the tables are equal.
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
