"""The engine: one per patched model. It walks the ports through each forward call.

Per call: hooks on the modules from the patched model down to its text model collect the call's inputs and open a `Run`;
hooks on decoder layers gather the rows that are still on their way and scatter the results back; attention modules call
`attend`. Nothing of a call outlives it, except in the layers of its cache.

Hidden states have their full length between layers at all times: a layer works on the surviving rows, and a token that
was dropped keeps the state it left with. So shapes never change, whatever stands between the layers.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from infer_patch.attend import attend
from infer_patch.attention import DenseAttention, ImplementationName, LazyMask, Port, forwards
from infer_patch.cache_memory import cache_bytes
from infer_patch.cache_swap import check_cache, swap_layers
from infer_patch.errors import UnsupportedCallError
from infer_patch.families import ModelParts
from infer_patch.installation import Installation, LayerHook
from infer_patch.method import Method, Runtime
from infer_patch.plan import Plan
from infer_patch.positions import packed_positions
from infer_patch.run import Run, ThreadState, padding_mask
from infer_patch.stats import Stats
from infer_patch.tokens import Reduction, Tokens, image_numbers
from infer_patch.vision_scores import Recorder
from infer_patch.vision_tower import find_vision_tower

_PER_TOKEN_ARGUMENTS = (
    "hidden_states",
    "position_ids",
    "position_embeddings",
    "attention_mask",
    "cache_position",
)


class Engine:
    """Everything one `patch` does to one model: `install` puts it on, `remove` takes it off."""

    def __init__(self, parts: ModelParts, plan: Plan):
        self.parts = parts
        self.methods: list[tuple[Method, tuple[int, ...], Runtime]] = [
            (method, layers, method.runtime(parts, layers)) for method, layers in plan.resolve(parts)
        ]
        self.stats = Stats(list(dict.fromkeys(m.name for m in plan)))
        self.reducers = self._by_port("reduce")
        self.selectors = {i: r for i, (r,) in self._by_port("select").items()}
        self.calibrators = {i: sorted(rs, key=_calibration_order) for i, rs in self._by_port("calibrate").items()}
        self.stores = {i: r for i, (r,) in self._by_port("store").items()}
        self.observers: dict[int, list[Runtime]] = {}
        self.watchers: dict[int, list[Runtime]] = {}
        for _, _, runtime in self.methods:
            for asked, layers in ((self.observers, runtime.observes), (self.watchers, runtime.watches)):
                for layer in layers:
                    asked.setdefault(layer, []).append(runtime)
        runtimes = [runtime for _, _, runtime in self.methods]
        self.packers = [runtime for runtime in runtimes if runtime.packs]
        looking = [runtime for runtime in runtimes if type(runtime).encode is not Runtime.encode]
        self.recorder = Recorder(find_vision_tower(parts), looking, parts.root.config) if looking else None
        self._reads_images = bool(self.reducers) or bool(looking) or any(runtime.reads_images for runtime in runtimes)
        self.first_reduced = min(self.reducers, default=parts.num_layers)
        self._thread = ThreadState()
        self._installation = Installation(parts)
        self._parameters = {m: list(inspect.signature(m.forward).parameters) for m in parts.path}

    def _by_port(self, port: str) -> dict[int, list[Runtime]]:
        served: dict[int, list[Runtime]] = {}
        for method, layers, runtime in self.methods:
            for layer in method.layers_of(port, layers, self.parts) if port in method.active_ports() else ():
                served.setdefault(layer, []).append(runtime)
        return served

    @property
    def run(self) -> Run | None:
        """The forward call this thread is in."""
        return self._thread.run

    def install(self) -> None:
        """Put everything on the model, or, if something fails, nothing."""
        installation = self._installation
        try:
            installation.swap_configs(lazy_masks=bool(self.methods))
            installation.add_ports(self._port)
            if self.recorder is not None:
                self.recorder.install(installation)
            for module in self.parts.path if self.methods else ():
                installation.add_hooks(module, self._enter, self._leave, always=True)
            for number in range(self.parts.num_layers):
                if number < self.first_reduced and number not in self.watchers:
                    continue
                gather, scatter = LayerHook(self, number, "_gather"), LayerHook(self, number, "_scatter")
                installation.add_hooks(self.parts.layers[number], gather, scatter)
        except BaseException:
            installation.remove()
            raise

    def remove(self) -> None:
        """Take everything off again. Calling it twice does nothing."""
        forwards.open.discard(id(self))  # a keyboard interrupt skips hooks, `always_call` ones too
        self._installation.remove()

    def _port(self, layer: int, dense: DenseAttention) -> Port:
        served = (self.selectors, self.calibrators, self.observers, self.stores)
        return Port(self, layer, dense, layer >= self.first_reduced or any(layer in s for s in served))

    def attend(self, port: Port, module: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
        return attend(self, port, module, *args)

    # A forward call

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        thread = self._thread
        if module is self.parts.root or not thread.open:
            forwards.open.add(id(self))
            thread.open, thread.inputs, thread.run = [], {}, None
            if self.recorder is not None:
                self.recorder.forget()
        thread.open.append(module)
        given = dict(zip(self._parameters[module], args)) | kwargs
        for name, value in given.items():
            if value is not None:
                thread.inputs.setdefault(name, value)
        if module is not self.parts.text_model:
            check_cache(given.get("past_key_values"))
            return None
        thread.run, cache = self._open_run(given, thread.inputs)
        changed = {}
        if cache is not None and cache is not given.get("past_key_values"):
            changed["past_key_values"] = cache
        if thread.run is not None and isinstance(given.get("attention_mask"), LazyMask):
            # an outer model made the mask (PaliGemma) and the text model would take ours for a tensor: it gets the
            # mask written out, and methods find the unwritten one in the run
            thread.run.mask = given["attention_mask"]
            changed["attention_mask"] = thread.run.mask.dense()
        if thread.run is not None and self.packers:
            changed.update(packed_positions(thread.run, self.packers, given))
        return (args, {**kwargs, **changed}) if changed else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        thread = self._thread
        run = thread.run
        if module is self.parts.text_model and run is not None:
            thread.run = None
            self._close_run(run)
            states = getattr(output, "hidden_states", None)
            if states and run.layer_input is not None and states[0].shape != run.layer_input.shape:
                output["hidden_states"] = (run.layer_input, *states[1:])
        if module in thread.open:
            del thread.open[thread.open.index(module) :]
            if not thread.open:
                forwards.open.discard(id(self))
                thread.inputs, thread.run = {}, None
                if self.recorder is not None:
                    self.recorder.forget()
        return output

    def _open_run(self, given: dict[str, Any], inputs: dict[str, Any]) -> tuple[Run | None, Cache | None]:
        source = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        cache = given.get("past_key_values")
        if source is None or source.shape[1] == 0:
            return None, cache
        training = torch.is_grad_enabled() and self.parts.text_model.training
        if not isinstance(self.parts.text_model.config._attn_implementation, ImplementationName):
            raise UnsupportedCallError(
                "the attention implementation was changed while the model was patched; unpatch, change it, patch again."
            )
        names = ("gradient_checkpointing", "activation_checkpointing")  # the latter from transformers 5.2x on
        if training and any(getattr(layer, name, False) for layer in self.parts.layers for name in names):
            raise UnsupportedCallError("gradient checkpointing re-runs layers out of order; switch it off, or unpatch.")
        if inputs.get("output_attentions") or getattr(self.parts.text_config, "output_attentions", False):
            raise UnsupportedCallError("a patched model cannot return attention weights (output_attentions=True).")
        check_cache(cache)
        batch, length = source.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        image = self._images(inputs, batch, length) if self._reads_images and length > 1 else None
        looked = self.recorder is not None and image is not None
        tokens = Tokens(
            batch=batch,
            length=length,
            past=past,
            mask=padding_mask(inputs.get("attention_mask"), past + length, source.device),
            image=image,
            device=source.device,
            scores=cast(Recorder, self.recorder).scores(inputs["input_ids"], inputs) if looked else None,
            asked=_asked(inputs.get("logits_to_keep")),
        )
        use_cache = given.get("use_cache")
        if cache is None and (self.parts.text_model.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.parts.text_model.config)
        if cache is not None:
            swap_layers(self, cache, tokens)
        recorded = inputs.get("output_hidden_states") or getattr(self.parts.text_config, "output_hidden_states", False)
        self.stats.call(tokens)
        return Run(tokens, cache, bool(recorded) or torch.is_grad_enabled()), cache

    def _close_run(self, run: Run) -> None:
        self.stats.cache_bytes = cache_bytes(run.cache)
        for i, runtime in self.stores.items():
            if (held := run.held(i)) is None:
                continue
            stats = self.stats.methods[runtime.config.name]
            stats.stored[i] = (held.rows, held.length)
            if runtime.config.keeps_packed():
                stats.stored_bytes[i] = (held.bytes_by_precision(), held.unquantised_bytes())

    def _images(self, inputs: dict[str, Any], batch: int, length: int) -> Tensor | None:
        ids = inputs.get("input_ids")
        if ids is None or tuple(ids.shape) != (batch, length):
            if any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
                raise UnsupportedCallError(
                    "visual tokens are told from text by their ids: pass input_ids (not inputs_embeds) with pictures."
                )
            return None
        is_visual = torch.isin(ids, torch.tensor(self.parts.image_token_ids, device=ids.device))
        return image_numbers(is_visual, inputs)

    # Reduction

    def _gather(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: drop what reducers drop here, and hand on only the surviving rows."""
        run = self._thread.run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        for runtime in self.watchers.get(number, ()):
            runtime.watch(number, hidden, run.tokens)
        if run.tokens.image is None:
            return None
        if number == 0:
            run.layer_input = hidden
        self._ask_reducers(number, run)
        reduction = run.reduction
        if reduction is None:
            return None
        run.full = hidden
        if (held := run.held(number)) is not None:
            held.expect(run.tokens, reduction)
        strange = [
            name
            for name, value in kwargs.items()
            if name not in _PER_TOKEN_ARGUMENTS and isinstance(value, Tensor) and run.tokens.length in value.shape[:2]
        ]
        if strange:
            raise UnsupportedCallError(
                f"{self.parts.model_type} hands its layers {', '.join(strange)} token by token, which reducing methods "
                "do not know how to shorten."
            )
        kwargs = dict(kwargs)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(
                run.once(part, lambda x: reduction.gather(x, -2)) for part in kwargs["position_embeddings"]
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = run.once(kwargs["position_ids"], lambda x: reduction.gather(x, -1))
        rows = reduction.gather(hidden, 1)
        if args:
            return (rows, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rows}

    def _ask_reducers(self, number: int, run: Run) -> None:
        tokens = run.tokens
        for runtime in self.reducers.get(number, ()):
            if tokens.has_holes:
                raise UnsupportedCallError(
                    "padding stands between real tokens of this batch; reducing methods need it on one side."
                )
            keep = runtime.reduce(number, tokens)
            if keep is None:
                continue
            if tokens.is_new is not None:
                keep = keep & tokens.is_new
            before = None if run.reduction is None else run.reduction.keep
            if before is not None:
                keep = keep & before
            run.reduction = Reduction.of(keep)
            self.stats.reduced(runtime.config.name, number, keep, cast(Tensor, tokens.image), before)

    def _scatter(self, number: int, args: tuple[Any, ...], output: Any) -> Any:
        """After a layer: put its rows back into the full sequence."""
        run = self._thread.run
        if run is None or run.reduction is None or run.full is None:
            return None
        rows = output[0] if isinstance(output, tuple) else output
        full = run.reduction.scatter(run.full, rows, inplace=not run.keep_outputs)
        run.full = None
        return (full, *output[1:]) if isinstance(output, tuple) else full


def _calibration_order(runtime: Runtime) -> int:
    return runtime.config.calibration_order or 0


def _asked(logits_to_keep: Any) -> int:
    """How many tokens at the end logits are wanted of; 1 where that is not said, or said of all (0)."""
    return max(logits_to_keep, 1) if isinstance(logits_to_keep, int) else 1
