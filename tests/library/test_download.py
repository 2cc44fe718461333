"""Downloads from a hub that fails in every way: the file is right, or it is not there."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub

from llamacli.errors import DownloadError, OutputError, UsageError
from llamacli.library import download, hub
from llamacli.library.checksums import kept, known, note, sha256_of
from llamacli.library.download import Download
from llamacli.library.http import Hub

SIZE = 6_000_001
DATA = np.random.RandomState(0).bytes(SIZE)


@pytest.fixture
def server():
    with FakeHub({"model-Q4_K_M.gguf": DATA}) as made:
        yield made


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def get(server, tmp_path, pauses):
    """Fetch the file; returns the Download."""

    def fetch(token=None, timeout=300.0):
        asked = Hub(server.url, token, sleep=pauses.append, timeout=timeout)
        (variant,) = hub.variants(asked, "me/model")
        with Download(asked, variant.files[0], tmp_path / "model.gguf") as made:
            made.finish()
        return made

    fetch.target, fetch.part = tmp_path / "model.gguf", tmp_path / "model.gguf.part"
    return fetch


def test_a_file_comes_whole_and_nothing_else_is_left(get, tmp_path):
    get()
    assert get.target.read_bytes() == DATA
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "model.gguf.json"]
    assert known(get.target) == kept(get.target) == sha256_of(get.target) == hashlib.sha256(DATA).hexdigest()


def test_a_download_that_is_cut_ten_times_fetches_nothing_twice(get, server):
    server.faults = [("cut", 500_000 + 7 * n) for n in range(10)]
    get()
    assert get.target.read_bytes() == DATA
    assert server.sent == SIZE
    starts = [headers["Range"] for path, headers in server.requests if "resolve" in path]
    assert len(starts) == 11


def test_ten_processes_that_are_killed_leave_what_came(server, tmp_path):
    """A real kill each time: the next process goes on, and under 1 % comes twice."""
    target = tmp_path / "model.gguf"
    code = """if 1:
        import os, signal, sys
        from pathlib import Path
        from llamacli.library import download, hub
        download.BLOCK = 4096
        asked = hub.Hub(sys.argv[1], timeout=300.0)
        (variant,) = hub.variants(asked, "me/model")
        stop = int(sys.argv[3])
        def follow(done, total):
            if done >= stop:
                os.kill(os.getpid(), signal.SIGKILL)
        with download.Download(asked, variant.files[0], Path(sys.argv[2]), follow) as made:
            made.finish()
    """
    for n in range(1, 11):
        stop = SIZE * n // 11
        server.faults = [
            ("cut", stop + 2000 - _size(tmp_path / "model.gguf.part"))
        ]  # what the network had in flight is bounded
        done = subprocess.run([sys.executable, "-c", code, server.url, str(target), str(stop)], timeout=300)
        assert done.returncode == -9
        assert not target.exists()
        assert _size(tmp_path / "model.gguf.part") >= stop
    server.faults = []
    subprocess.run([sys.executable, "-c", code, server.url, str(target), str(SIZE + 1)], timeout=300, check=True)
    assert target.read_bytes() == DATA
    assert server.sent < 1.01 * SIZE


def _size(path):
    return path.stat().st_size if path.exists() else 0


def test_a_connection_that_stalls_is_given_up_and_taken_up_again(get, server):
    server.faults = [("stall", 1_000_000), ("stall", 0)]
    get(timeout=1.0)
    assert get.target.read_bytes() == DATA
    assert server.sent == SIZE


def test_wrong_bytes_never_get_the_name_and_the_next_try_begins_anew(get, server, tmp_path):
    server.faults = [("wrong", 12345)]
    with pytest.raises(DownloadError, match="expected SHA-256"):
        get()
    assert os.listdir(tmp_path) == []
    get()
    assert get.target.read_bytes() == DATA


def test_what_a_power_cut_spoiled_is_fetched_again_and_no_more(get, server, monkeypatch):
    """A file's length may reach the disk before its last bytes do: those behind the last fsync are not trusted."""
    monkeypatch.setattr(download, "SYNC", 1 << 20)
    monkeypatch.setattr("llamacli.library.http.TRIES", 1)
    server.faults = [("cut", 3_000_000)]
    with pytest.raises(DownloadError, match="run the command again"):
        get()
    state = json.loads(get.part.with_name("model.gguf.part.json").read_text())
    state["synced"] = 2 << 20
    get.part.with_name("model.gguf.part.json").write_text(json.dumps(state))
    with get.part.open("r+b") as part:
        part.seek(-500_000, 2)
        part.write(bytes(500_000))
    get()
    assert get.target.read_bytes() == DATA
    assert server.sent == SIZE + (SIZE - (2 << 20))  # the spoiled tail shows at the end only


def test_a_part_of_another_file_is_not_continued(get, server, monkeypatch):
    monkeypatch.setattr("llamacli.library.http.TRIES", 1)
    server.faults = [("cut", 3_000_000)]
    with pytest.raises(DownloadError):
        get()
    server.files["model-Q4_K_M.gguf"] = other = DATA[::-1]
    get()
    assert get.target.read_bytes() == other


def test_a_redirect_to_another_host_is_followed_without_the_token(server, get):
    server.token = "secret"
    with FakeHub(server.files) as cdn:
        elsewhere = cdn.url.replace("127.0.0.1", "localhost")
        server.faults = [
            ("redirect", "/me/model/resolve/main/model-Q4_K_M.gguf"),
            ("redirect", f"{elsewhere}/cdn/model-Q4_K_M.gguf"),
        ]
        get(token="secret")
        assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.requests)
        assert len(cdn.requests) == 1
        assert all("Authorization" not in headers for _, headers in cdn.requests)
    assert get.target.read_bytes() == DATA


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://localhost/x", "http://[", ""])
def test_a_redirect_to_anything_but_the_web_is_not_followed(location, server, get):
    server.faults = [("redirect", location)]
    with pytest.raises(DownloadError, match="redirect"):
        get()


def test_redirects_in_a_circle_end(server, get):
    server.faults = [("redirect", "/me/model/resolve/main/model-Q4_K_M.gguf")] * 50
    with pytest.raises(DownloadError, match="more than 6 redirects"):
        get()


def test_too_many_requests_are_waited_for_as_long_as_the_hub_says(server, get, pauses):
    server.faults = [("status", 429, {"Retry-After": "7"}), ("status", 503, {}), ("cut", 1000)]
    get()
    assert pauses[0] == 7
    assert len(pauses) == 3
    assert get.target.read_bytes() == DATA
    get.target.unlink()
    server.faults = [("status", 429, {"Retry-After": "86400"})]
    with pytest.raises(DownloadError, match="asks to wait 86400 seconds"):
        get()


def test_pauses_grow_and_end(server, get, pauses):
    server.faults = [("status", 500, {})] * 50
    with pytest.raises(DownloadError, match=r"HTTP 500.*8 tries in a row"):
        get()
    assert len(pauses) == 7
    assert pauses[0] <= 1 < pauses[-1] <= 60


@pytest.mark.parametrize(
    "endpoint", ["", "huggingface.co", "ftp://hub", "http://", "http://hub:port", "http://[hub", "http://a b"]
)
def test_a_wrong_address_is_refused_by_the_name_of_its_variable(endpoint):
    with pytest.raises(DownloadError, match=r"^HF_ENDPOINT: expected an address"):
        Hub(endpoint, "token")


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf_secr\u2026t", "hf_se cret"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token, server):
    with pytest.raises(DownloadError, match=r"^HF_TOKEN: expected") as caught:
        hub.variants(Hub(server.url, token), "me/model")
    assert "hf_" not in str(caught.value)
    assert server.requests == []


def test_a_missing_answer_is_reported_in_one_line(tmp_path):
    with FakeHub({}) as gone:
        pass
    with pytest.raises(DownloadError, match=r"127.0.0.1: no answer"):
        hub.variants(Hub(gone.url, sleep=lambda s: None), "me/model")


@pytest.mark.parametrize(
    "token, status, words",
    [
        (None, 401, "check the name, or set HF_TOKEN"),
        ("t", 401, "does not take HF_TOKEN"),
        ("t", 403, "accept its licence at http://.*/me/model$"),
        (None, 403, "accept its licence at .*, then set HF_TOKEN"),
        (None, 404, "check the spelling"),
        (None, -401, "accept its licence at .*, then set HF_TOKEN"),
    ],
)
def test_what_is_refused_says_what_to_do(server, token, status, words):
    asked = Hub(server.url, token)
    server.faults = [("status", abs(status), {"X-Error-Code": "GatedRepo"} if status < 0 else {})]
    (variant,) = hub.variants(asked, "me/model")
    from llamacli.library.http import Refused

    with pytest.raises(Refused) as refused:
        asked.open(variant.files[0].url)
    with pytest.raises(DownloadError, match=words):
        raise hub.denied(refused.value, "me/model", asked)


def test_a_server_that_gives_another_size_is_refused(server, get):
    server.faults = [("cut", 1000)]
    listed = server.listing()
    listed[0]["lfs"]["size"] = SIZE + 5
    server.tree = listed
    with pytest.raises(DownloadError, match="expected bytes from 0 on of 6000006"):
        get()
    assert not get.target.exists()


def test_two_processes_do_not_write_the_same_file(server, get, tmp_path):
    asked = Hub(server.url)
    (variant,) = hub.variants(asked, "me/model")
    with Download(asked, variant.files[0], tmp_path / "model.gguf"), pytest.raises(DownloadError, match="another process"):
        get()


def test_a_link_in_the_place_of_the_part_is_not_written_through(server, get, tmp_path):
    (tmp_path / "victim").write_text("mine")
    get.part.symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"model.gguf.part: expected to write it"):
        get()
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_what_came_stays(server, get, monkeypatch):
    def full(fd, data, at, real=os.pwrite):
        if at > 2_000_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, at)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="No space left"):
            get()
    before = server.sent
    get()
    assert get.target.read_bytes() == DATA
    assert server.sent - before < SIZE - 1_900_000


# what a hub lists


def entry(path="m-Q8_0.gguf", size=10, oid="0" * 64, **more):
    return {"type": "file", "path": path, "size": size, "lfs": {"oid": oid, "size": size}} | more


@pytest.mark.parametrize(
    "bad",
    [
        entry("../evil.gguf"),
        entry("a/../../evil.gguf"),
        entry("/etc/evil.gguf"),
        entry("a\\..\\evil.gguf"),
        entry("x\x1b[31m.gguf"),
        entry("x" * 600 + ".gguf"),
        entry(size=-1),
        entry(size=0),
        entry(size=1 << 60),
        entry(size="10"),
        entry(oid="../../x"),
        entry(oid="0" * 63 + "g"),
        entry(lfs=None),
    ],
)
def test_a_listing_that_is_unsound_is_refused(server, bad):
    server.tree = [bad]
    with pytest.raises(DownloadError, match="me/model: expected"):
        hub.variants(Hub(server.url), "me/model")


@pytest.mark.parametrize("tree", [{"error": "x"}, [1, None, "a", {"type": "file"}, {"type": "directory", "path": "x.gguf"}]])
def test_an_answer_that_is_no_listing_is_refused(server, tree):
    server.tree = tree
    with pytest.raises(DownloadError, match="expected"):
        hub.variants(Hub(server.url), "me/model")


def test_the_listing_is_the_one_that_the_hubs_own_client_reads(server):
    """The reference: huggingface_hub, which comes with tokenizers."""
    from huggingface_hub import HfApi

    found = [each for each in HfApi(endpoint=server.url).list_repo_tree("me/model", recursive=True) if hasattr(each, "lfs")]
    ours = [file for variant in hub.variants(Hub(server.url), "me/model") for file in variant.files]
    assert [(file.name, file.size, file.sha256) for file in ours] == [(f.path, f.lfs.size, f.lfs.sha256) for f in found]


def test_parts_are_put_together_and_pictures_left_out(server):
    server.tree = [
        *(entry(f"Q4_K_M/m-Q4_K_M-0000{n}-of-00003.gguf", 5) for n in (3, 1, 2)),
        *(entry(f"m-Q8_0-0000{n}-of-00003.gguf", 5) for n in (1, 3)),  # one is missing
        entry("m-UD-Q2_K_XL.gguf", 7),
        entry("mmproj-F16.gguf", 3),
        entry("README.md"),
    ]
    found = hub.variants(Hub(server.url), "me/model")
    assert [(v.label, v.nbytes, len(v.files)) for v in found] == [("UD-Q2_K_XL", 7, 1), ("Q4_K_M", 15, 3)]
    assert found[1].files[0].url.endswith("/Q4_K_M/m-Q4_K_M-00001-of-00003.gguf")
    assert hub.choose(found, None, "me/model").label == "Q4_K_M"
    assert hub.choose(found, "q2_k_xl", "me/model").label == "UD-Q2_K_XL"
    assert hub.choose(found, "m-Q4_K_M", "me/model").label == "Q4_K_M"
    with pytest.raises(UsageError, match="found UD-Q2_K_XL, Q4_K_M; name one as me/model:UD-Q2_K_XL"):
        hub.choose(found, "Q6_K", "me/model")


@pytest.mark.parametrize("text", ["x", "a/b/c", "../b", "a/..", "a b/c", "", "-a/b", "a/b:"])
def test_what_is_no_repository_is_refused(text):
    with pytest.raises(UsageError, match="expected USER/REPO"):
        hub.parse(text)


def test_a_repository_is_written_in_the_ways_that_people_copy():
    assert hub.parse("https://huggingface.co/me/model-GGUF") == ("me/model-GGUF", None)
    assert hub.parse("hf.co/me/model:Q4_K_M") == ("me/model", "Q4_K_M")


def test_the_checksum_is_that_of_the_file(server):
    (variant,) = hub.variants(Hub(server.url), "me/model")
    assert variant.files[0].sha256 == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sha256": 3}', '{"sha256": "' + "0" * 63 + '"}', "[" * 4000, "null"])
def test_a_damaged_note_is_ignored(get, text):
    get()
    note(get.target).write_text(text)
    assert known(get.target) is None and kept(get.target) is None


def test_a_file_that_was_written_to_is_not_taken_for_what_was_checked(get):
    get()
    os.utime(get.target, ns=(1, 1))
    assert kept(get.target) is None
    assert known(get.target) == hashlib.sha256(DATA).hexdigest()
