"""A conversation with one model: its turns, its patch, and a cache that is read again and not filled again.

The cache holds the keys of tokens, and a conversation is text. Before each answer the whole conversation is tokenised
anew, and the cache is used only if those tokens start with the ones it holds. It is never handed from one plan to
another: what a plan dropped is gone, and what it kept was computed under it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from transformers import Cache

from infer_patch.api import Handle, is_patched, patch
from infer_patch.cache_memory import cache_bytes
from infer_patch.errors import PatchError
from infer_patch.plan import Plan, PlanLike
from infer_patch.stats import describe
from infer_patch.streaming import StopWhen, TextStream
from infer_patch.turns import Turn, TurnEncoder


@dataclass(frozen=True)
class Answer:
    """One answer, and what it took.

    Parameters
    ----------
    ids : tuple of int
        Its tokens, the end token included.
    ended : str
        "end" (the model's own), "length" (the limit was reached) or "stopped" (by the caller).
    whole_tokens, new_tokens : int
        Tokens of the conversation it answers, and how many of them were read now rather than found in the cache.
    first_token_s : float
        Seconds from the message to the first token.
    tokens_per_s : float, optional
        Of the tokens after the first; None when there is only one.
    cache_bytes : int
        Keys and values held afterwards.
    effect : str
        What each method of the plan did for this answer; empty when there is none.
    anew : str
        Why the conversation was read from its start although there was a cache; empty when it was not.
    """

    text: str
    ids: tuple[int, ...]
    ended: Literal["end", "length", "stopped"]
    whole_tokens: int
    new_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    cache_bytes: int
    effect: str
    anew: str


class Conversation:
    """Talk to a loaded model, patched or not; use it as a context manager, or call `close`.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched: the conversation puts its plan on, and takes it off again.
    processor : processor, or tokenizer of a text-only model
        Without a chat template the model goes on with the plain text, each message on a new line.
    plan : plan, preset name or plan file, optional
    system : str
        A system message, if not empty.
    max_new_tokens : int
        Of one answer.
    temperature : float
        0 is greedy decoding.

    Raises
    ------
    PatchError
        Values out of range, a model that is patched already, a template without system messages; whatever `patch`
        raises.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        plan: PlanLike | None = None,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ):
        if max_new_tokens < 1:
            raise PatchError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
        if not temperature >= 0:
            raise PatchError(f"temperature must be 0 (greedy) or more, got {temperature}.")
        if is_patched(model):
            raise PatchError("this model is patched already; unpatch it, and give the plan to the conversation.")
        self.model = model
        self.encoder = TurnEncoder(model, processor)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._opening = (Turn("system", system),) if system else ()
        if self._opening:
            self.encoder.encode((*self._opening, Turn("user", "?")))
        self._handle: Handle | None = None
        self.reset()
        if plan is not None:
            self._handle = patch(model, Plan.of(plan))

    @property
    def plan(self) -> Plan | None:
        """The plan that is on."""
        return None if self._handle is None else self._handle.plan

    def change_plan(self, plan: PlanLike | None) -> bool:
        """Put another plan on, or none; False when it is on already.

        The turns stay. The cache goes: the next message reads the conversation anew from its text. When the plan is
        refused, everything is as before.
        """
        wanted = None if plan is None else Plan.of(plan)
        if wanted == self.plan:
            return False
        if wanted is not None:
            self._handle = patch(self.model, wanted, replace=True)
        elif self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._fired: set[str] = set()
        self._forget("the plan was changed")
        return True

    def reset(self) -> None:
        """Forget all turns but the system message; the plan stays on."""
        self.turns: tuple[Turn, ...] = self._opening
        self._fired = set()
        self._forget("")

    def close(self) -> None:
        """Take the plan off and let the cache go."""
        self.change_plan(None)
        self._forget("the conversation was closed")

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(
        self,
        text: str,
        images: Sequence[Any] = (),
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Send a message and return the answer, which becomes part of the conversation.

        Parameters
        ----------
        text : str
        images : sequence of PIL images
            They stand in front of the text.
        on_text : callable, optional
            Takes the answer piece by piece, as soon as its characters are known.
        should_stop : callable, optional
            Asked after each token; True ends the answer there, and what there is of it counts.

        Raises
        ------
        PatchError
            An empty message, pictures for a model that reads none, a conversation longer than the model takes. After
            an exception, whichever, the conversation is what it was before the message, without its cache.
        """
        begin = time.perf_counter()
        if not text:
            raise PatchError("the message is empty; give it a text.")
        if images and not self.encoder.takes_images:
            raise PatchError("this model's processor takes text only; leave the pictures out.")
        turns = (*self.turns, Turn("user", text, tuple(images)))
        inputs = self.encoder.encode(turns)
        ids: list[int] = inputs["input_ids"][0].tolist()
        room = self.encoder.room(len(ids))
        limit = self.max_new_tokens if room is None else min(self.max_new_tokens, room)
        inputs, held, anew = self._from_cache(inputs, ids, with_images=bool(images))
        stream = TextStream(self.encoder.decode, on_text)
        stop = StopWhen(should_stop)
        try:
            output = self.model.generate(**inputs, **self._options(limit, stream, stop))
            end = time.perf_counter()
            self._keep(output)
        except BaseException:
            self._forget("the last answer was broken off")
            raise
        finally:
            effect = self._effect()
        words = self.encoder.decode(stream.ids)
        self.turns = (*turns, Turn("assistant", words))
        after_first = len(stream.ids) - 1
        return Answer(
            text=words,
            ids=tuple(stream.ids),
            ended="stopped" if stop.stopped else "end" if stream.ids[-1] in self._end_ids() else "length",
            whole_tokens=len(ids),
            new_tokens=len(ids) - held,
            first_token_s=stream.first - begin,
            tokens_per_s=after_first / (end - stream.first) if after_first else None,
            cache_bytes=cache_bytes(output.past_key_values),
            effect=effect,
            anew=anew,
        )

    # The cache

    def _forget(self, why: str) -> None:
        """Let the cache go; `why` is told with the next answer, if there is a conversation to be read anew."""
        self._cache: Cache | None = None
        self._cached: list[int] = []
        self._why = why if len(self.turns) > len(self._opening) else ""

    def _keep(self, output: Any) -> None:
        """Keep the cache for the next message: it holds every token but the last, which was never read."""
        held: list[int] = output.sequences[0, :-1].tolist()
        cache = output.past_key_values
        if isinstance(cache, Cache) and cache.get_seq_length() == len(held):
            self._cache, self._cached, self._why = cache, held, ""
        else:
            self._cache, self._cached, self._why = None, [], "this model keeps no cache that can be read again"

    def _from_cache(self, inputs: dict[str, Any], ids: list[int], with_images: bool) -> tuple[dict[str, Any], int, str]:
        """What `generate` takes, how many tokens the cache spares, and why it spares none although there is one."""
        held = len(self._cached)
        if self._cache is not None and with_images:
            # processors and positions of most families take the pictures of a whole prompt, not the last of them
            self._forget("a picture came")
        elif self._cache is not None and (held >= len(ids) or ids[:held] != self._cached):
            self._forget("the text of the turns before has other tokens than the cache")
        if self._cache is None:
            return inputs, 0, self._why
        whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return {**whole, "past_key_values": self._cache}, held, ""

    # Generation

    def _options(self, max_new_tokens: int, stream: TextStream, stop: StopWhen) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {
            **sampling,
            "max_new_tokens": max_new_tokens,
            "num_beams": 1,
            "use_cache": True,
            "return_dict_in_generate": True,
            "streamer": stream,
            "stopping_criteria": [stop],
        }

    def _end_ids(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]

    def _effect(self) -> str:
        """What the plan did since it was last asked."""
        if self._handle is None:
            return ""
        words = []
        for name, figures in self._handle.report(reset=True).methods.items():
            if figures["fired"]:
                self._fired.add(name)
                words.append(f"{name}: {describe(figures)}")
            else:
                nothing = "nothing new" if name in self._fired else "no effect yet"
                reasons = ", ".join(figures.get("dense_calls", ()))
                words.append(f"{name}: {nothing}" + (f" ({reasons})" if reasons else ""))
        return "; ".join(words)
