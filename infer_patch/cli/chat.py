"""`infer-patch chat`: talk to a model, and put plans on and off while talking.

Answers go to stdout, everything else to stderr, so that a script gets the answers alone.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from infer_patch.cli.common import Device, Dtype
from infer_patch.cli.compare import quiet
from infer_patch.errors import MissingDependencyError, PatchError

if TYPE_CHECKING:
    from infer_patch.conversation import Answer, Conversation
    from infer_patch.plan import Plan

HELP = """\
/patch         what is on
/patch PLAN    put another plan on: a preset or a .yaml file
/patch off     take it off
/image PATH    the next message carries this picture
/reset         forget the conversation
/quit          end, as does the end of the input
Ctrl-C stops an answer after the token it is at; pressed again, at once. A space in front makes a message of a line
that begins with a slash."""
# what a terminal would obey rather than show, should a model write it
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, `demo` or `demo-vlm`.")],
    plan: Annotated[
        str | None, typer.Option(help="A preset or a .yaml file; without it the model is unpatched.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of torch, for a temperature above 0.")] = 0,
) -> None:
    """Talk to a model in the terminal; /help lists what can be done on the way, such as /patch off.

    Each answer is followed by a line of figures: tokens, time, cache, and what the plan did. Without a terminal,
    messages are read line by line, and the exit code is 1 when one of them was refused.
    """
    console = Console(stderr=True, highlight=False)
    with console.status("Loading PyTorch and transformers") as status:
        import torch

        from infer_patch.conversation import Conversation
        from infer_patch.evals.loading import load
        from infer_patch.plan import Plan

        wanted = None if plan is None else Plan.of(plan)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
            conversation = Conversation(
                loaded,
                processor,
                wanted,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
    torch.manual_seed(seed)
    interactive = _is_terminal()
    with quiet(), conversation:
        talk = _Talk(conversation, console, interactive)
        talk.greet(model)
        for line in _lines(interactive, talk.dim):
            if not talk.take(line):
                break
    if talk.refused and not interactive:
        raise typer.Exit(1)


class _Talk:
    """Takes lines, and prints what comes of them."""

    def __init__(self, conversation: Conversation, console: Console, interactive: bool):
        self.conversation = conversation
        self.console = console
        self.interactive = interactive
        self.images: list[Any] = []  # for the next message
        self.refused = False

    def greet(self, model: str) -> None:
        if self.interactive:
            self.dim(f"{model}, {_on(self.conversation.plan)}. /help lists the commands, Ctrl-D ends.")
        if not self.conversation.encoder.has_template:
            self.dim("This model has no chat template: it goes on with the plain text of the conversation.")

    def take(self, line: str) -> bool:
        """Serve one line; False when the conversation is over."""
        if not line.strip():
            return True
        try:
            if not line.startswith("/"):
                self._message(line.strip())
                return True
            name, _, rest = line[1:].strip().partition(" ")
            if name == "quit":
                return False
            command = getattr(self, f"_command_{name}", None)
            if command is None:
                raise PatchError(f"there is no command /{name}; /help lists them.")
            command(rest.strip())
        except (PatchError, MissingDependencyError) as error:
            self._refuse(str(error))
        return True

    def dim(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def _refuse(self, message: str) -> None:
        self.refused = True
        self.console.print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)

    def _message(self, text: str) -> None:
        import torch

        try:
            with _interrupts() as was_pressed:
                answer = self.conversation.say(text, self.images, _write, was_pressed)
        except KeyboardInterrupt:
            typer.echo()
            if not self.interactive:
                raise typer.Exit(130) from None
            self.dim("Broken off. The message is forgotten, and the next one reads the conversation anew.")
            return
        except torch.OutOfMemoryError as error:
            typer.echo()
            self._refuse(f"out of memory; the message is forgotten. {error}")
            return
        self.images = []
        typer.echo()
        self.dim(_figures(answer))
        if answer.anew:
            self.dim(f"The conversation was read anew: {answer.anew}.")

    def _command_help(self, rest: str) -> None:
        self.dim(HELP)

    def _command_reset(self, rest: str) -> None:
        self.conversation.reset()
        self.images = []
        self.dim("The conversation is forgotten.")

    def _command_image(self, rest: str) -> None:
        from infer_patch.evals.loading import open_images

        if not rest:
            raise PatchError("/image needs the path of a picture.")
        if not self.conversation.encoder.takes_images:
            raise PatchError("this model's processor takes text only, no pictures.")
        quoted = len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\""
        path = Path(rest[1:-1] if quoted else rest).expanduser()
        self.images += open_images([path])
        width, height = self.images[-1].size
        self.dim(f"The next message carries {path.name} ({width} x {height}), picture {len(self.images)} of it.")

    def _command_patch(self, rest: str) -> None:
        if rest:
            changed = self.conversation.change_plan(None if rest == "off" else rest)
            begun = any(turn.role == "assistant" for turn in self.conversation.turns)
            anew = "; the next message reads the conversation anew, as a cache cannot go from plan to plan"
            self.dim(f"{_on(self.conversation.plan)}{anew if changed and begun else ''}.")
        else:
            plan = self.conversation.plan
            methods = "" if plan is None else ", ".join(map(repr, plan)) or "no method"
            self.dim(f"{_on(plan)}{': ' if methods else ''}{methods}.")


def _on(plan: Plan | None) -> str:
    return "unpatched" if plan is None else f"{plan.name} is on"


def _write(text: str) -> None:
    typer.echo(text.translate(_CONTROL), nl=False)


def _figures(answer: Answer) -> str:
    """One line: tokens in and out, time, cache, and what the plan did."""
    from infer_patch.evals.verdict import megabytes
    from infer_patch.report.formats import seconds

    ended = {"end": "", "length": " (the limit)", "stopped": " (stopped)"}[answer.ended]
    speed = "" if answer.tokens_per_s is None else f", then {answer.tokens_per_s:.3g} tokens/s"
    parts = (
        f"{answer.new_tokens:,} new of {answer.whole_tokens:,} tokens in",
        f"{len(answer.ids):,} out{ended}",
        f"first after {seconds(answer.first_token_s)}{speed}",
        f"cache {megabytes(answer.cache_bytes)}",
        answer.effect,
    )
    return "; ".join(part for part in parts if part)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _lines(interactive: bool, dim: Callable[[str], None]) -> Iterator[str]:
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        importlib.import_module("readline")  # arrow keys, and the lines before
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            dim("/quit or Ctrl-D ends.")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks once, so that no forward call is torn apart, and insists the second time."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    presses = 0

    def on_press(*_: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, previous)
