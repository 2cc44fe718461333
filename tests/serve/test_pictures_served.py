"""Pictures in requests: counted before the tower runs, encoded one at a time; text requests do not wait for them."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import pytest
import tiny_tower
from PIL import Image
from serving import chat, post, raw, serving, until

from llamacli import Model
from llamacli.environment import SMALL_MODEL
from llamacli.serve.app import Limits


def url(seed, width=60, height=40):
    file = BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def seen(*urls, **fields):
    """The body of a request with pictures."""
    content = [{"type": "text", "text": "What is it?"}, *({"type": "image_url", "image_url": {"url": u}} for u in urls)]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0, **fields}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tiny_tower.tower_gguf(tmp_path_factory.mktemp("tower") / "mmproj.gguf", n_text=256, image_size=56, seed=3)
    with (
        Model.load(SMALL_MODEL, threads=1, ctx=1024, mmproj=path) as model,
        serving(model, Limits(places=2)) as made,
    ):
        yield made


class Slow:
    """A tower that a test controls: `begun` names the pictures it was given, `go` lets it encode one more."""

    def __init__(self, sight):
        self.look, self.begun, self.go, self.stop = sight.look, [], threading.Semaphore(0), threading.Event()

    def __call__(self, source, most_tiles=None):
        self.begun.append(source)
        self.stop.clear()
        while not self.go.acquire(timeout=0.01):
            if self.stop.is_set():
                raise KeyboardInterrupt
        return self.look(source, most_tiles)


@pytest.fixture
def slow(client, monkeypatch):
    sight = client.server.model.sight
    made = Slow(sight)
    monkeypatch.setattr(sight, "look", made)
    monkeypatch.setattr(sight, "interrupt", made.stop.set)
    yield made
    made.go.release(1000)
    until(lambda: client.server.scheduler.active == 0)


def ask(client, body, key="none"):
    return httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=300, headers={"x-api-key": key})


def test_the_answer_to_a_picture_is_that_of_a_fresh_model(client):
    body = seen(url(1), url(2), max_tokens=12)
    content = [{"type": "text", "text": "What is it?"}, *({"type": "image", "image": url(n)} for n in (1, 2))]
    alone = client.server.model.stream([{"role": "user", "content": content}], 12, temp=0)
    assert ask(client, body).json()["choices"][0]["message"]["content"] == "".join(piece.text for piece in alone)


def test_pictures_beyond_the_context_are_refused_before_the_tower_looks_at_one(client, slow):
    refused = ask(client, seen(*[url(1)] * 70))
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert slow.begun == []


def test_counting_looks_at_no_picture(client, slow):
    source = {"type": "base64", "media_type": "image/png", "data": url(1).partition(",")[2]}
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "source": source}]
    message = {"messages": [{"role": "user", "content": content}]}
    counted = client.post("/v1/messages/count_tokens", json=message).json()["input_tokens"]
    assert slow.begun == []
    slow.go.release(1)
    usage = client.post("/v1/messages", json=message | {"max_tokens": 1}).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    many = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}] * 200}]}
    assert client.post("/v1/messages/count_tokens", json=many).json()["input_tokens"] > 1024


def test_texts_do_not_wait_for_a_picture(client, slow):
    with ThreadPoolExecutor(1) as pool:
        picture = pool.submit(ask, client, seen(url(3)))
        until(lambda: slow.begun)
        for path, body in (
            ("/v1/chat/completions", chat("Hi", max_tokens=2)),
            ("/tokenize", {"content": "Hi"}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            assert client.post(path, json=body).status_code == 200
        assert not picture.done()
        slow.go.release(1)
        assert picture.result().status_code == 200


def test_pictures_of_several_requests_take_turns_and_no_more_are_remembered_than_there_are_places(client, slow):
    with ThreadPoolExecutor(3) as pool:
        asked = []
        for number in (10, 20, 30):
            asked.append(pool.submit(ask, client, seen(*(url(number + n) for n in range(3)))))
            until(lambda: slow.begun)
            until(lambda: client.server._looking._work_queue.qsize() == (len(asked) > 1))
        for _ in range(9):
            slow.go.release(1)
        assert all(each.result().status_code == 200 for each in asked)
    first = [url(10 + n) for n in range(3)], [url(20 + n) for n in range(3)]
    assert slow.begun[:4] == [first[0][0], first[1][0], first[0][1], first[1][1]]
    assert set(slow.begun[-3:]) >= {url(31), url(32)}  # the third waited


def test_the_tower_stops_for_a_client_that_left_and_encodes_the_next_picture(client, slow):
    made = raw(client, post(seen(url(40), url(41))))
    until(lambda: slow.begun)
    waiting = raw(client, post(seen(url(42))))
    until(lambda: client.server._looking._work_queue.qsize() == 1)
    waiting.close()
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(ask, client, seen(url(43)))
        until(lambda: client.server._looking._work_queue.qsize() >= 1)
        made.close()
        until(lambda: url(43) in slow.begun)
        slow.go.release(1)
        assert last.result().status_code == 200
    assert slow.begun == [url(40), url(43)]
    until(lambda: client.server._bodies.held == 0 and client.server._seeing._value == 2)


def test_an_interrupt_that_was_meant_for_another_picture_ends_none(client, slow):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, seen(url(50)))
        until(lambda: slow.begun)
        slow.stop.set()
        until(lambda: len(slow.begun) == 2)
        slow.go.release(1)
        assert asked.result().status_code == 200


def test_a_damaged_picture_gives_its_place_back(client):
    body = url(60)[:-40]
    for _ in range(3):
        assert ask(client, seen(body + "=" * (-len(body.partition(",")[2]) % 4))).status_code == 400
    until(lambda: client.server._seeing._value == 2)  # a moment after the answer was sent
