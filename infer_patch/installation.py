"""What a patch puts on a model, and how it comes off again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from infer_patch.attention import PORT, DenseAttention, ImplementationName, Port, base_attention
from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts


class Installation:
    """Configuration copies, ports on attention modules and hooks; `remove` leaves no trace of any.

    The configuration is copied rather than changed because models may share one object. Plain lists and bound methods
    are used throughout so that a deep copy or pickle of a patched model is a patched model of its own.
    """

    def __init__(self, parts: ModelParts):
        self.parts = parts
        self._hooks: list[RemovableHandle] = []
        self._configs: list[tuple[nn.Module, Any]] = []  # modules and the configurations they had
        self._added: list[tuple[nn.Module, str]] = []  # attributes that were not there before

    def swap_configs(self, lazy_masks: bool) -> None:
        """Give the modules that read the text configuration a copy that names our attention function."""
        text_configs = {id(self.parts.text_config), id(self.parts.text_model.config)}
        copies: dict[int, Any] = {}

        def replaced(config: Any) -> Any:
            if id(config) not in copies:
                copies[id(config)] = twin = copy.copy(config)
                if id(config) in text_configs:
                    name = ImplementationName(config._attn_implementation or "eager", lazy_masks)
                    twin._attn_implementation_internal = name
                for name, value in vars(config).items():
                    if id(value) in text_configs:
                        setattr(twin, name, replaced(value))
            return copies[id(config)]

        for config in [m.config for m in self.parts.path] + [self.parts.text_config]:
            replaced(config)
        for module in self.parts.root.modules():
            config = vars(module).get("config")
            if id(config) in copies:
                self._configs.append((module, config))
                module.config = copies[id(config)]

    def add_ports(self, make: Callable[[int, DenseAttention], Port]) -> None:
        """Give each attention module its port: make(layer, the model's own attention function)."""
        for layer, module in enumerate(self.parts.attentions):
            name = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if not isinstance(name, ImplementationName):
                raise UnsupportedModelError(
                    f"{self.parts.model_type}: attention of layer {layer} does not read the text model's configuration."
                )
            self._add(module, PORT, make(layer, base_attention(module, name.base)))

    def add_tower_port(self, module: nn.Module, make: Callable[[DenseAttention], Any]) -> None:
        """Give a vision attention a port, and a configuration of its own that names our attention function."""
        config = vars(module)["config"]
        name = ImplementationName(config._attn_implementation or "eager", lazy=False)
        dense = base_attention(module, name.base)
        twin = copy.copy(config)
        twin._attn_implementation_internal = name
        self._configs.append((module, config))
        module.config = twin
        self._add(module, PORT, make(dense))

    def add_method(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Let `method` answer for a method of this one instance."""
        self._add(module, name, method)

    def _add(self, module: nn.Module, name: str, value: Any) -> None:
        setattr(module, name, value)
        self._added.append((module, name))

    def add_hooks(self, module: nn.Module, before: Any, after: Any, always: bool = False) -> None:
        """A forward pre-hook, and a forward hook that comes before all others (`always`: after exceptions too)."""
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, always_call=always, prepend=True))

    def remove(self) -> None:
        """Take everything off again. Calling it twice does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._added:
            module, name = self._added.pop()
            vars(module).pop(name, None)
        while self._configs:
            module, config = self._configs.pop()
            module.config = config


class LayerHook:
    """A hook of one decoder layer (a plain object, so that patched models can be copied and pickled)."""

    def __init__(self, engine: Any, number: int, method: str):
        self.engine, self.number, self.method = engine, number, method

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> Any:
        return getattr(self.engine, self.method)(self.number, args, other)
