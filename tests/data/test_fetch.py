"""Downloads: checked to the byte, or refused with what to do."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile
from types import SimpleNamespace

import pytest

from lss.config import Refused
from lss.data.fetch import CORPORA, Corpus, _copy, fetch


def archive(tmp_path, payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("corpus", payload)
    (tmp_path / "archive.zip").write_bytes(buffer.getvalue())
    return (tmp_path / "archive.zip").as_uri()


def test_fetch_checks_every_byte(tmp_path):
    payload = b"some text " * 1000
    known = {"it": Corpus(archive(tmp_path, payload), "corpus", len(payload), hashlib.sha256(payload).hexdigest())}
    target = fetch("it", tmp_path / "to", known)
    assert target.read_bytes() == payload
    assert fetch("it", tmp_path / "to", known) == target
    assert sorted(p.name for p in target.parent.iterdir()) == ["it"]
    target.write_bytes(payload[:-1] + b"!")
    with pytest.raises(Refused, match="SHA-256"):
        fetch("it", tmp_path / "to", known)
    other = {"it": Corpus(known["it"].url, "corpus", len(payload), "0" * 64)}
    with pytest.raises(Refused, match="SHA-256"):
        fetch("it", tmp_path / "elsewhere", other)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_fetch_says_plainly_that_there_is_no_network(tmp_path):
    closed = Corpus("http://127.0.0.1:9/enwik8.zip", "enwik8", 1, "0" * 64)
    with pytest.raises(Refused, match=r"there is no network here.*put the unpacked file at .*enwik8"):
        fetch("enwik8", tmp_path, {"enwik8": closed})
    with pytest.raises(Refused, match="known: enwik8"):
        fetch("enwik9", tmp_path)
    assert CORPORA["enwik8"].size == 10**8


def test_fetch_of_an_archive_that_is_none(tmp_path):
    url = archive(tmp_path, b"text " * 50)
    broken = (tmp_path / "archive.zip").read_bytes()
    for content in (b"<html>sign in</html>", b"", broken[:60], broken[:40] + b"\xff" * 9 + broken[49:]):
        (tmp_path / "archive.zip").write_bytes(content)
        with pytest.raises(Refused):
            fetch("it", tmp_path / "to", {"it": Corpus(url, "corpus", 250, hashlib.sha256(b"text " * 50).hexdigest())})
        assert list((tmp_path / "to").iterdir()) == []
    with pytest.raises(Refused, match="not the archive expected"):
        fetch("it", tmp_path / "to", {"it": Corpus(archive(tmp_path, b"x"), "other", 1, "0" * 64)})


def test_fetch_into_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "enwik8").mkdir()
    for folder in (tmp_path / "file", tmp_path):
        with pytest.raises(Refused, match=r"--to=.*cannot be used"):
            fetch("enwik8", folder, {"enwik8": Corpus("file:///none", "enwik8", 1, "0" * 64)})


def test_a_member_larger_than_its_corpus_is_not_unpacked_whole(tmp_path, monkeypatch):
    largest = []
    monkeypatch.setattr("lss.data.fetch._verify", lambda file, corpus: largest.append(file.stat().st_size))
    fetch("it", tmp_path / "to", {"it": Corpus(archive(tmp_path, b"x" * (5 << 20)), "corpus", 3 << 20, "")})
    assert largest == [3 << 20]


def test_an_endless_answer_is_cut_off(tmp_path):
    (tmp_path / "zeros").write_bytes(b"\0" * (4 << 20))
    with (tmp_path / "archive").open("wb") as file, (tmp_path / "zeros").open("rb") as source:
        _copy(SimpleNamespace(headers={}, read=source.read), file, "it", most=1 << 20)
        assert file.tell() == 2 << 20


class Server(http.server.BaseHTTPRequestHandler):
    """Answers 404, or breaks off in the middle."""

    def do_GET(self):
        self.send_response(404 if "gone" in self.path else 200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"PK\3\4")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("path, words", [("gone", "the server says 404"), ("cut", "not the archive expected")])
def test_what_the_server_says_is_told(tmp_path, path, words):
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            known = {"it": Corpus(f"http://127.0.0.1:{server.server_port}/{path}", "corpus", 10, "0" * 64)}
            with pytest.raises(Refused, match=words):
                fetch("it", tmp_path, known)
        finally:
            server.shutdown()
            thread.join()
    assert list(tmp_path.iterdir()) == []
