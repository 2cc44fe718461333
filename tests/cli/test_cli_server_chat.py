"""A chat at a terminal continues although its server fails, stops sending or sends control sequences."""

import subprocess
import threading

from pretending import RUN, error, pretending, response, said, stream
from terminal import Terminal


def test_text_of_the_server_does_not_steer_the_terminal(tmp_path):
    with pretending(stream(said("\x1b]0;owned\x07red \x1b[31m"), said("", "stop"))) as (url, _):
        t = Terminal([*RUN, "run", "--server", url, "--no-stdin", "Hi"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("red")
        t.close()
    assert "\x1b]0;" not in t.raw and "\x1b[31m" not in t.raw.replace("\x1b[31m\x1b", "")


def test_a_chat_survives_a_server_that_goes_away(tmp_path):
    answers = [stream(said("Fine.", "stop")), stream(said("Half"), end=b""), stream(said("Whole again.", "stop"))]
    with pretending(lambda c: c.sendall(answers.pop(0))) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("How are you?\r")
        t.wait("Fine.")
        t.type("And now?\r")
        t.wait("broke off")
        t.type("/regen\r")
        t.wait("Whole again.")
        t.close()


def test_ctrl_c_ends_the_wait_for_a_silent_server_and_the_chat_goes_on(tmp_path):
    left = threading.Event()

    def silent(connection):
        connection.recv(1)  # until the client closes
        left.set()

    answers = [silent, lambda c: c.sendall(stream(said("Here I am.", "stop")))]
    with pretending(lambda c: answers.pop(0)(c)) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("Are you there?\r")
        t.wait("reading the prompt")
        t.type("\x03")
        assert left.wait(300), "the connection is still open"
        t.wait("stopped by Ctrl-C")
        t.type("/regen\r")
        t.wait("Here I am.")
        t.close()


def test_a_chat_beyond_the_servers_context_gets_advice_how_to_make_room(tmp_path):
    words = error("the prompt has 600 tokens and the context holds 512", "context_length_exceeded")
    answers = [stream(said("Half", None), end=b""), response(words, "400 Bad Request"), stream(said("Short enough.", "stop"))]
    with pretending(lambda c: c.sendall(answers.pop(0))) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("Begin\r")
        t.wait("broke off")
        t.close()
        t = Terminal([*RUN, "chat", "--server", url, "--continue"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("/regen answers anew")
        t.type("A long question\r")
        t.wait("/undo, /drop or /clear makes room")
        t.type("/undo\r")
        t.type("A short one\r")
        t.wait("Short enough.")
        t.close()


def test_how_far_the_server_is_with_the_prompt_is_shown(tmp_path):
    head, _, events = stream(said("Done.", "stop")).partition(b"\r\n\r\n")
    seen = threading.Event()

    def slow(connection):
        connection.sendall(head + b"\r\n\r\n: 256 of 1024 tokens of the prompt\n\n")
        seen.wait(300)
        connection.sendall(events)

    with pretending(slow) as (url, _):
        t = Terminal([*RUN, "run", "--server", url, "--no-stdin", "Hi"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("256 of 1,024 tokens")
        seen.set()
        t.wait("Done.")
        t.close()


def test_a_chat_sends_its_pictures_with_every_turn(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    with pretending(stream(said("red", "stop"))) as (url, asked):
        command = [*RUN, "chat", "--server", url, "--image", str(tmp_path / "red.png")]
        done = subprocess.run(command, input="What is it?\nSure?\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (body["messages"] for _, body in asked if body)
    kinds = [part["type"] for part in first[0]["content"]]
    assert (
        kinds == ["image_url", "text"]
        and first == second[:1]
        and second[1:]
        == [
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "Sure?"},
        ]
    )
