"""Methods: the four ports, the configuration base class and the registry.

A method is two small things. Its **configuration** is a frozen dataclass of plain values (this file's `Method`); its
**runtime** (`Runtime`) does the work while a model is patched. The engine calls a runtime through four ports only:

========== =========================================================== =======================
port       question it answers                                          runtime method
========== =========================================================== =======================
reduce     which tokens go on to the next layer?                        `observe`, `reduce`
select     which key blocks does each query block read?                 `select`
calibrate  how are chosen rows of the attention output corrected?       `calibrate`
store      how are keys and values kept?                                `cache_layer`
========== =========================================================== =======================
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from infer_patch.errors import PlanError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from infer_patch.cache import IndexedLayer
    from infer_patch.families import ModelParts
    from infer_patch.kernels.block_mask import BlockMask
    from infer_patch.kernels.hidden_keys import HiddenKeys
    from infer_patch.kernels.subset_attention import TokenSubset
    from infer_patch.run import AttentionCall
    from infer_patch.tokens import Tokens
    from infer_patch.vision_tower import TowerCall

PORTS = ("reduce", "select", "calibrate", "store")


def option(default: Any, help: str) -> Any:
    """A configuration field with its one-line description (shown by `infer-patch list`)."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all method configurations: plain, validated, serialisable values.

    Parameters
    ----------
    layers : tuple of int, optional
        Decoder layers (0-based) the method acts on. Default: every layer it applies to.
    """

    layers: tuple[int, ...] | None = option(None, "decoder layers to act on (default: all it applies to)")

    name: ClassVar[str] = ""
    ports: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    modality: ClassVar[str] = "any"  # "any", or "vision": needs a model with visual tokens
    # place among the calibrating methods of a layer, the lowest first; None: it tolerates no other
    calibration_order: ClassVar[int | None] = None
    artifact: ClassVar[str | None] = None  # what `infer-patch calibrate` must have produced, if anything

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
            if not layers or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
                raise PlanError(f"{self.name}: layers must be layer numbers from 0 up, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        self.validate()

    def validate(self) -> None:
        """Check field values; raise `PlanError` with what came and what is expected."""

    def active_ports(self) -> tuple[str, ...]:
        """The ports this configuration uses (some options add one)."""
        return self.ports

    def layers_of(self, port: str, layers: tuple[int, ...], parts: ModelParts) -> tuple[int, ...]:
        """Those of the layers it acts on in which it uses one of its ports; all of them unless a method says else."""
        return layers

    def keeps_packed(self) -> bool:
        """Whether its cache layers hold keys in a form that no other method can read."""
        return False

    def applicable_layers(self, parts: ModelParts) -> tuple[int, ...]:
        """Layers of this model the method can serve; raise `UnsupportedModelError` if it cannot serve any."""
        return tuple(range(parts.num_layers))

    def resolve_layers(self, parts: ModelParts) -> tuple[int, ...]:
        """The layers the method will act on in this model."""
        possible = self.applicable_layers(parts)
        if self.layers is None:
            return possible
        impossible = [i for i in self.layers if i not in possible]
        if impossible:
            raise UnsupportedModelError(
                f"{self.name}: layers {impossible} of {parts.model_type} were asked for, but it can act on "
                f"layers {_ranges(possible)} only. Leave `layers` out to take all of those."
            )
        return self.layers

    def runtime(self, parts: ModelParts, layers: tuple[int, ...]) -> Runtime:
        """The object that does the work in one patched model."""
        raise TypeError(f"{type(self).__name__} defines no runtime")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the method's name and every option that differs from its default."""
        values = {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return {"method": self.name, **values}

    def require_numbers(self, *names: str) -> None:
        """Raise `PlanError` for an option of these that is no number."""
        for name in names:
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
            self.require(good, f"{name} must be a number, got {value!r}")

    @classmethod
    def require(cls, condition: bool, message: str) -> None:
        """Raise `PlanError` naming the method unless `condition` holds."""
        if not condition:
            raise PlanError(f"{cls.name}: {message}")


class Runtime:
    """The working half of a method in one patched model; subclasses fill in the ports they declare.

    Runtimes keep no per-prompt state: what must survive from one forward call to the next lives in the cache layer
    (`call.state`), so that two prompts, beams or a second turn can never see each other's.
    """

    observes: frozenset[int] = frozenset()
    watches: frozenset[int] = frozenset()
    any_mask = False  # does `calibrate` serve layers whose own mask is more than causal (`call.ordered`)?
    reads_lse = False  # does `calibrate` make use of `call.lse`, where the model's own attention can tell it?
    reads_images = False  # does it need `tokens.image`? Methods with a reduce port get it anyway
    packs = False  # do tokens that it drops at layer 0 give up their positions to those behind them?

    def __init__(self, config: Method, parts: ModelParts, layers: tuple[int, ...]):
        self.config = config
        self.key = repr(config)  # under which it keeps things with a cache: they are found again in copies of the two
        self.parts = parts
        self.layers = frozenset(layers)

    def observe(self, layer: int, call: AttentionCall) -> None:
        """See queries and keys of a layer in `observes`, before its attention runs."""

    def encoder_blocks(self, feature_block: int) -> Collection[int]:
        """Blocks of the vision encoder to see with `encode`; features come from the output of `feature_block`."""
        return ()

    def encode(self, block: int, call: TowerCall) -> dict[str, torch.Tensor]:
        """Values per token of a vision block's input, float32 [b, n] by name; those of one name add up over blocks.

        They come back as `tokens.scores.values[self, name]`, one for every visual token of a call.
        """
        raise TypeError(f"{type(self).__name__} does not look into the vision encoder")

    def watch(self, layer: int, hidden: torch.Tensor, tokens: Tokens) -> None:
        """See the hidden states [B, T, C] that enter a layer in `watches`, before `reduce` is asked.

        All T tokens are there; one that was dropped has the state it left with. Padding is in it too (`tokens.is_new`).
        """

    def reduce(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        """Which tokens enter `layer`: bool [B, T] over the tokens of this call, or None for all."""

    def select(self, layer: int, call: AttentionCall) -> BlockMask | TokenSubset | HiddenKeys | str:
        """The key blocks each query block reads, or the reason (a short text) to run dense instead.

        A call whose queries are all its keys may also be answered with the tokens that take part in it, and any call
        with keys that some heads do not read.
        """
        raise TypeError(f"{type(self).__name__} has no select port")

    def calibrate(self, layer: int, call: AttentionCall, output: torch.Tensor) -> torch.Tensor | str:
        """Correct the attention output [b, H, T, D] of a call; or the reason (a short text) to leave it as it is.

        Returns a tensor of the same shape, and puts into `call.counts` how many "rows" (of one head each) it changed,
        beside other figures for the report. `output` must not be written into. With a `calibration_order`, it corrects
        the rows as `call.edits` left them (`infer_patch/row_edits.py`) and appends its own.
        """
        raise TypeError(f"{type(self).__name__} has no calibrate port")

    def cache_layer(self, layer: int) -> IndexedLayer:
        """A fresh cache layer for `layer`."""
        raise TypeError(f"{type(self).__name__} has no store port")


_REGISTRY: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a method known under `name` (lower case, underscores).

    Raises
    ------
    TypeError
        For a name that is malformed or taken, unknown ports, a class that is not a frozen dataclass, or one without
        a docstring, a summary or a runtime: mistakes of whoever writes the method, caught at import.
    """

    def decorate(cls: _M) -> _M:
        problems = []
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            problems.append("the name must be lower case letters, digits and underscores")
        if name in _REGISTRY:
            problems.append(f"the name is taken by {_REGISTRY[name].__qualname__}")
        if (
            not issubclass(cls, Method)
            or not dataclasses.is_dataclass(cls)
            or not getattr(cls, "__dataclass_params__").frozen
        ):
            problems.append("the class must be a frozen dataclass derived from Method")
        elif not cls.ports or set(cls.ports) - set(PORTS):
            problems.append(f"ports must be some of {PORTS}, got {cls.ports}")
        elif cls.runtime is Method.runtime or not cls.summary or not cls.__doc__:
            problems.append("a docstring, a summary and a runtime are required")
        if problems:
            raise TypeError(f"cannot register {name!r} ({cls.__qualname__}): " + "; ".join(problems))
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def methods() -> dict[str, type[Method]]:
    """All known methods by name; imports the files in `patches/`."""
    import infer_patch.patches  # noqa: F401  (each file registers its method)

    return dict(sorted(_REGISTRY.items()))


def method_from_dict(values: dict[str, Any]) -> Method:
    """Build a method from `{"method": name, option: value, ...}`; raises `PlanError` for unknown names or options."""
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise PlanError(f"a method entry needs a `method:` name, got {values!r}")
    known = methods()
    if values["method"] not in known:
        raise PlanError(f"unknown method {values['method']!r}; known methods: {', '.join(known)}")
    cls = known[values["method"]]
    options = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - options - {"method"})
    if unknown:
        raise PlanError(f"{cls.name} has no option {', '.join(unknown)}; its options: {', '.join(sorted(options))}")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "method"}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise PlanError(f"{cls.name}: {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"
