"""`infer-patch chat` with scripted input: what is said, what is refused, and what Ctrl-C does."""

import importlib
import signal

import pytest
from typer.testing import CliRunner

import infer_patch
from infer_patch.cli import app
from infer_patch.conversation import Conversation
from infer_patch.evals.scenes import make_scene

LONG = "A story of many words. " * 20
SHORT = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def chatty_folder(chatty, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chatty"
    for part in chatty:
        part.save_pretrained(path)
    return path


def chat(model, lines, *options, code=0):
    done = CliRunner().invoke(app, ["chat", str(model), *options], input="".join(f"{line}\n" for line in lines))
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def told(done):
    return [line for line in done.stderr.splitlines() if line.strip()]


def figures(done):
    return [line for line in told(done) if " tokens in; " in line]


def test_answers_go_to_stdout_and_figures_to_stderr(chatty_folder, chatty):
    done = chat(chatty_folder, [LONG, "", "And then?"], *SHORT, "--plan", "sink_window-evict", "--system", "Be brief.")
    with Conversation(*chatty, "sink_window-evict", system="Be brief.", max_new_tokens=12) as talk:
        answers = [talk.say(LONG.strip()), talk.say("And then?")]
    assert done.stdout == "".join(f"{answer.text}\n" for answer in answers)
    assert len(told(done)) == 2
    for line, answer in zip(figures(done), answers):
        assert line.startswith(f"{answer.new_tokens} new of {answer.whole_tokens} tokens in; 12 out (the limit); first")
        assert "tokens/s; cache" in line and line.endswith(answer.effect)


def test_patch_off_in_the_middle(chatty_folder, chatty, tmp_path):
    plan = tmp_path / "narrow.yaml"
    plan.write_text("name: narrow\nmethods:\n- {method: sink_window, window: 64, evict: true}\n")
    lines = ["/patch", f"/patch {plan}", LONG, "/patch", "/patch off", "/patch off", "And then?", "Why?"]
    done = chat(chatty_folder, lines, *SHORT)
    said = told(done)
    assert said[:2] == ["unpatched.", "narrow is on."] and "held at most" in said[2]
    assert said[3].startswith("narrow is on: SinkWindow(") and "evict=True" in said[3]
    assert said[4].startswith("unpatched; the next message reads the conversation anew") and said[5] == "unpatched."
    assert said[7] == "The conversation was read anew: the plan was changed." and len(said) == 9
    with Conversation(*chatty, str(plan), max_new_tokens=12) as talk:
        expected = [talk.say(LONG.strip()).text]
        turns = talk.turns
    with Conversation(*chatty, max_new_tokens=12) as talk:
        talk.turns = turns
        expected += [talk.say("And then?").text, talk.say("Why?").text]
    assert done.stdout.splitlines() == expected


def test_refusals_are_one_line_and_the_conversation_goes_on(chatty_folder):
    lines = ["abc", "/patch nonsense", "/patch fastv", "/foo", "/image", "/image x.png", "x" * 3000, "def"]
    done = chat(chatty_folder, lines, *SHORT, code=1)
    errors = [line for line in told(done) if line.startswith("error: ")]
    words = ["unknown preset 'nonsense'", "llama has none", "no command /foo", "path", "text only", "takes 2,048"]
    assert len(errors) == 6 and all(word in line for word, line in zip(words, errors))
    assert len(told(done)) == 8 and figures(done)[1].startswith("23 new of 55 ")


def test_reset_help_quit_and_a_message_that_begins_with_a_slash(chatty_folder):
    done = chat(chatty_folder, ["abc", "/reset", "abc", " /quit", "/help", "/quit", "never read"], *SHORT)
    first, again, slash = done.stdout.splitlines()
    assert first == again and slash and "/patch off" in done.stderr
    new = [line.split(" new")[0] for line in figures(done)]
    assert new[0] == new[1] and len(new) == 3


def test_a_model_without_a_template_says_so_once(chatty_folder, chatty, tmp_path):
    model, tokenizer = chatty
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    done = chat(tmp_path, ["abc", "def"], *SHORT)
    assert [line for line in told(done) if "no chat template" in line] == told(done)[:1]
    assert figures(done)[1].startswith("5 new of 19 ")


def test_a_cache_started_anew_is_told(folder):
    done = chat(folder, ["abc", "def"], *SHORT)
    assert told(done)[-1].startswith("The conversation was read anew: the text of the turns before")


def test_a_picture(tmp_path):
    make_scene(3).image().save(tmp_path / "a scene.png")
    ask = "is there a red arrow in the image ?"
    lines = [f'/image "{tmp_path / "a scene.png"}"', ask, ask, "/image absent.png", "/reset", ask]
    done = chat("demo-vlm", lines, "--plan", "fastv", code=1)
    assert "a scene.png (128 x 128), picture 1" in told(done)[0] and "cannot read the image" in done.stderr
    whole = [int(line.split(" of ")[1].split()[0]) for line in figures(done)]
    assert whole[0] > 256 and whole[1] > whole[0] and whole[2] < 20  # the picture is forgotten, too
    assert "visual tokens" in figures(done)[0] and "nothing new" in figures(done)[1]


class Pressing:
    """Presses Ctrl-C in given forward calls of a model."""

    def __init__(self, model, *calls):
        self.calls, self.count = calls, 0
        self.hook = model.model.layers[1].register_forward_pre_hook(self.press)

    def press(self, *_):
        self.count += 1
        for _ in range(self.calls.count(self.count)):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def pressed(chatty, monkeypatch):
    """Lets `chat` run on the miniature of the fixture, with Ctrl-C pressed in the calls that are given."""
    started = []

    def start(*calls):
        monkeypatch.setattr("infer_patch.evals.loading.load", lambda *_: chatty)
        started.append(Pressing(chatty[0], *calls))

    handler = signal.getsignal(signal.SIGINT)
    yield start
    for pressing in started:
        pressing.hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not infer_patch.is_patched(chatty[0])


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(chatty, pressed):
    with Conversation(*chatty, "sink_window-evict", max_new_tokens=12) as talk:
        whole = talk.say(LONG.strip())
    pressed(3)
    done = chat("any", [LONG, "And then?"], *SHORT, "--plan", "sink_window-evict")
    assert "3 out (stopped)" in figures(done)[0] and "12 out (the limit)" in figures(done)[1]
    first, second = done.stdout.splitlines()
    assert len(first) == 3 and whole.text.startswith(first) and len(second) == 12


def test_ctrl_c_twice_breaks_off_at_once(pressed):
    pressed(3, 3)
    done = chat("any", ["abc", "def"], *SHORT, "--plan", "sink_window-evict", code=130)
    assert not figures(done) and len(done.stdout.strip()) == 2


def test_ctrl_c_twice_in_a_terminal_forgets_the_message(chatty, pressed, monkeypatch):
    with Conversation(*chatty, max_new_tokens=12) as talk:
        expected = talk.say("def").text
    typed = iter(["abc", KeyboardInterrupt, "def", EOFError])

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(importlib.import_module("infer_patch.cli.chat"), "_is_terminal", lambda: True)
    pressed(3, 3)
    done = chat("any", [], *SHORT)
    assert "unpatched. /help lists the commands" in told(done)[0] and told(done)[1].startswith("Broken off.")
    assert told(done)[2] == "/quit or Ctrl-D ends." and len(told(done)) == 4
    assert done.stdout.splitlines()[-2] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plan", "nonsense"], "unknown preset"),
        (["--plan", "fastv"], "llama has none"),
        (["--dtype", "int3"], "unknown dtype"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_start_gives_exit_code_2(folder, options, words):
    done = chat(folder, ["abc"], *options, code=2)
    assert words in done.stderr and not done.stdout
