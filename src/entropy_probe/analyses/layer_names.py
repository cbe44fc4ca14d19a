"""Which layer and which kind of module a parameter belongs to, by its name."""

from __future__ import annotations

_ADAPTER_PREFIX = "base_model.model."
_WRAPPERS = ("base_layer", "modules_to_save", "original_module")


def layer_and_module(parameter: str) -> tuple[str, str]:
    """The layer and the module of a parameter, without what adapters put around them.

    The layer is the name up to its first number, ``model.layers.0``; outside of numbered layers it is the module's own
    name, ``lm_head``. The module is the last part that is not an adapter's: ``q_proj`` for
    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``.
    """
    path = parameter.removeprefix(_ADAPTER_PREFIX).split(".")[:-1]
    end = next((k for k, part in enumerate(path) if part.startswith("lora_") or part in _WRAPPERS), len(path))
    path = path[:end] or ["(model)"]
    number = next((k for k, part in enumerate(path) if part.isdigit()), None)
    if number is None:
        return path[-1], path[-1]
    return ".".join(path[: number + 1]), path[-1] if number + 1 < len(path) else ".".join(path[: number + 1])
