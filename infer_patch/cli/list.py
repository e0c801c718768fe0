"""`infer-patch list`: the methods and presets there are, and the page of one of them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from infer_patch.method import Method

# What a modality and a port ask of a model; `patch` checks the same things on the model itself.
_MODALITIES = {
    "any": "serves every supported family",
    "vision": "serves families with visual tokens in the decoder and refuses text-only models",
}
_PORTS = {
    "select": (
        "leaves layers with a window of their own as they are; refuses models whose layers all have one, soft-capped "
        "scores (Gemma 2) and learned sinks (gpt-oss)"
    ),
}


def show(
    name: Annotated[str | None, typer.Argument(help="A method or a preset; shows its whole page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")] = False,
) -> None:
    """List methods and presets, or show one of them with its options."""
    console = Console()
    with Console(stderr=True).status("Loading the methods"):
        from infer_patch.method import methods
        from infer_patch.plan import presets

        known = methods()
    if name is not None and name.replace("-", "_") in known and name not in presets():
        name = name.replace("-", "_")  # as `calibrate` spells it
    if name is not None and name not in known and name not in presets():
        from infer_patch.errors import PlanError

        raise PlanError(
            f"no method or preset is called {name!r}; methods: {', '.join(known)}; presets: {', '.join(presets())}"
        )
    if as_json:
        chosen = {
            "methods": [method_entry(cls) for key, cls in known.items() if name in (None, key)],
            "presets": [preset_entry(key) for key in presets() if name in (None, key)],
        }
        typer.echo(json.dumps(chosen, indent=2))
        return
    if name is None:
        _print_all(console, known, presets())
        return
    if name in known:
        _print_method(console, known[name])
    if name in presets():
        _print_preset(console, name)


def method_entry(cls: type[Method]) -> dict[str, Any]:
    """What there is to know about a method, in plain values."""
    return {
        "name": cls.name,
        "ports": list(cls.ports),
        "summary": cls.summary,
        "modality": cls.modality,
        "models": models_in_words(cls),
        "artifact": cls.artifact,
        "paper": cls.paper or None,
        "options": [
            {"name": f.name, "type": str(f.type), "default": f.default, "help": f.metadata.get("help", "")}
            for f in _own_fields_first(cls)
        ],
    }


def preset_entry(name: str) -> dict[str, Any]:
    """A preset with its description and methods, in plain values."""
    from infer_patch.plan import Plan, preset_description

    return {"name": name, "description": preset_description(name), "methods": Plan.preset(name).to_dict()["methods"]}


def models_in_words(cls: type[Method]) -> str:
    """Which families a method serves and which it refuses."""
    words = [_MODALITIES[cls.modality], *(_PORTS[port] for port in cls.ports if port in _PORTS)]
    return "; ".join(words)


def _own_fields_first(cls: type[Method]) -> list[dataclasses.Field[Any]]:
    """Options as the method's docstring orders them: its own, then the inherited `layers`."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.name == "layers")


def _print_all(console: Console, known: dict[str, type[Method]], names: list[str]) -> None:
    columns = Column("name", no_wrap=True), "port", "what it does", "models", "needs", "paper"
    table = Table(*columns, title="Methods", title_justify="left")
    for cls in known.values():
        row = (cls.name, ", ".join(cls.ports), cls.summary, cls.modality, cls.artifact or "-", cls.paper or "-")
        table.add_row(*map(escape, row))
    console.print(table)
    for word, meaning in (_MODALITIES | _PORTS).items():
        if any(word == cls.modality or word in cls.ports for cls in known.values()):
            console.print(f"[bold]{word}[/]: {meaning}.", highlight=False)
    table = Table("name", "methods", "description", title="\nPresets", title_justify="left")
    for name in names:
        entry = preset_entry(name)
        methods = ", ".join(m["method"] for m in entry["methods"]) or "none"
        table.add_row(*map(escape, (name, methods, entry["description"])))
    console.print(table)
    console.print("The page of each: infer-patch list NAME", style="dim")


def _print_method(console: Console, cls: type[Method]) -> None:
    console.print(f"[bold]{cls.name}[/] (port: {', '.join(cls.ports)})\n")
    for indent, text in paragraphs(inspect.getdoc(cls) or ""):
        console.print(Padding(Text(text), (0, 0, 0, indent)))
    console.print(f"\nModels: {models_in_words(cls)}.", highlight=False)
    console.print(f"Needs: {cls.artifact or 'nothing but the model'}.\n", highlight=False)
    table = Table("option", "default", "meaning", title="Options", title_justify="left")
    for f in _own_fields_first(cls):
        table.add_row(f.name, escape(repr(f.default)), escape(f.metadata.get("help", "")))
    console.print(table)


def paragraphs(doc: str) -> list[tuple[int, str]]:
    """A docstring as (indentation, text) paragraphs that can be wrapped anew; headings keep their lines."""
    found: list[tuple[int, str]] = []
    may_join = False
    for line in doc.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if may_join and text and found[-1][0] == indent and set(text) != {"-"}:
            found[-1] = indent, f"{found[-1][1]} {text}"
        else:
            found.append((indent, text))
        may_join = bool(text) and set(text) != {"-"} and " : " not in text
    return found


def _print_preset(console: Console, name: str) -> None:
    from infer_patch.plan import Plan, preset_description

    console.print(f"\nPreset [bold]{escape(name)}[/]: {escape(preset_description(name))}\n", highlight=False)
    console.print(Syntax(Plan.preset(name).to_yaml(), "yaml", background_color="default"))
