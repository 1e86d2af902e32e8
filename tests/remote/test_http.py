"""Range requests against a server that does everything wrong that servers do."""

from __future__ import annotations

import email.utils
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from server import Fault, Request, Server

from surgery.remote import connection, retry
from surgery.remote.address import parse
from surgery.remote.http import HttpFile
from surgery.remote.problems import Missing, RemoteProblem

CONTENT = os.urandom(300_000)


@pytest.fixture
def file(web: Server) -> HttpFile:
    (web.folder / "x.safetensors").write_bytes(CONTENT)
    return HttpFile(parse(f"{web.url}/x.safetensors"))


def first(count: int, fault: Fault):
    """The fault, for the first `count` requests."""
    return lambda request: fault if request.number < count else None


def test_ranges_are_the_bytes_of_the_file(file: HttpFile, web: Server) -> None:
    assert file.begin(1000) == CONTENT[:1000] and file.size == len(CONTENT) and file.version
    for a, n in ((0, 1), (299_999, 1), (1234, 56_789), (0, 300_000)):
        assert file.read(a, n) == CONTENT[a : a + n]
    assert [r.range for r in web.log] == [(0, 999), (0, 0), (299_999, 299_999), (1234, 58_022), (0, 299_999)]


def test_a_file_shorter_than_the_first_range_and_an_empty_one(web: Server) -> None:
    (web.folder / "short").write_bytes(b"abc")
    (web.folder / "empty").write_bytes(b"")
    short, empty = (HttpFile(parse(f"{web.url}/{n}")) for n in ("short", "empty"))
    assert short.begin(1 << 17) == b"abc" and short.size == 3
    assert empty.begin(1 << 17) == b"" and empty.size == 0


def test_one_connection_is_used_again(file: HttpFile, web: Server) -> None:
    file.begin(10)
    for i in range(5):
        file.read(i, 10)
    assert len(web.log) == 6 and len({r.port for r in web.log}) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(file: HttpFile, web: Server, status: int) -> None:
    web.faults.append(first(2, Fault(status=status)))
    assert file.begin(1000) == CONTENT[:1000] and len(web.log) == 3


def test_retry_after_is_honoured(file: HttpFile, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(attempts=5, first=0.5, longest=40.0))
    web.faults.append(first(1, Fault(status=429, headers={"Retry-After": "7"})))
    web.faults.append(lambda r: Fault(status=503, headers={"Retry-After": "9999"}) if r.number == 1 else None)
    web.faults.append(lambda r: Fault(status=500) if r.number in (2, 3) else None)
    file.begin(10)
    waits = [w for w in waits if w > 0]  # the server's own sleeps are of zero
    assert waits[:2] == [7.0, 40.0] and 1.0 <= waits[2] <= 2.0 and 2.0 <= waits[3] <= 4.0


def test_retry_after_may_be_a_date(file: HttpFile, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(first=0.001, longest=40.0))
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    web.faults.append(first(1, Fault(status=429, headers={"Retry-After": date})))
    web.faults.append(lambda r: Fault(status=429, headers={"Retry-After": "whenever"}) if r.number == 1 else None)
    file.begin(10)
    waits = [w for w in waits if w > 0]
    assert 15 < waits[0] <= 20 and waits[1] <= 0.002


def test_patience_ends(file: HttpFile, web: Server) -> None:
    web.faults.append(lambda r: Fault(status=503))
    with pytest.raises(RemoteProblem, match=r"x\.safetensors: the server answers 503 Service Unavailable \(5 attempts\)"):
        file.begin(10)
    assert len(web.log) == 5


def test_a_truncated_body_goes_on_where_it_ended(file: HttpFile, web: Server) -> None:
    file.begin(10)
    web.faults.append(lambda r: Fault(cut=100_000))
    assert file.read(0, 300_000) == CONTENT
    starts = [r.range[0] for r in web.log[1:] if r.range]
    assert starts == [0, 100_000, 200_000]


def test_a_server_that_sends_next_to_nothing_is_given_up(file: HttpFile, web: Server) -> None:
    file.begin(10)
    web.faults.append(lambda r: Fault(cut=3))
    with pytest.raises(RemoteProblem, match=r"ends early|broke"):
        file.read(0, 300_000)
    assert len(web.log) == 6


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(whole=True), "sends the whole file"),
        (Fault(shift=5), "asked for bytes 0 to 99, it sent 5 to"),
        (Fault(headers={"Content-Range": "bytes 0-99/*"}), "do not say which bytes"),
        (Fault(headers={"Content-Range": "nonsense"}), "do not say which bytes"),
        (Fault(headers={"Content-Encoding": "gzip"}), "compressed"),
        (Fault(headers={"Content-Range": "bytes 0-5000/300000"}), "it sent 0 to 5000"),
    ],
)
def test_what_serves_no_ranges_is_refused(file: HttpFile, web: Server, fault: Fault, said: str) -> None:
    web.faults.append(lambda r: fault)
    with pytest.raises(RemoteProblem) as found:
        file.begin(100)
    assert said in found.value.message and "byte ranges" in found.value.message and "download" in (found.value.hint or "")
    assert len(web.log) == 1


def test_a_change_is_seen_by_tag_size_and_end(file: HttpFile, web: Server, tmp_path: Path) -> None:
    file.begin(100)
    path = web.folder / "x.safetensors"
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(RemoteProblem, match=r"changed since it was opened \(its tag was"):
        file.read(0, 100)
    path.write_bytes(CONTENT + b"1")
    with pytest.raises(RemoteProblem, match="it had 300000 bytes, it has 300001"):
        file.read(0, 100)
    path.write_bytes(CONTENT[:1000])
    with pytest.raises(RemoteProblem, match="it had 300000 bytes, it has fewer"):
        file.read(2000, 100)
    path.write_bytes(CONTENT)
    assert file.read(2000, 100) == CONTENT[2000:2100]


def test_a_change_during_a_retry_is_seen(file: HttpFile, web: Server) -> None:
    file.begin(10)

    def replace(request: Request) -> Fault | None:
        if request.number == 1:
            return Fault(cut=100_000)
        (web.folder / "x.safetensors").write_bytes(CONTENT[::-1])
        return None

    web.faults.append(replace)
    with pytest.raises(RemoteProblem, match="changed since it was opened"):
        file.read(0, 300_000)


def test_weak_tags_and_times_of_change_do(file: HttpFile, web: Server) -> None:
    web.faults.append(lambda r: Fault(etag='W/"a"' if r.number % 2 else '"a"'))
    file.begin(10)
    assert file.read(10, 10) == CONTENT[10:20] and file.version == "a"
    web.faults[:] = [lambda r: Fault(headers={"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})]
    other = HttpFile(parse(f"{web.url}/x.safetensors"))
    other.begin(10)
    web.faults[:] = [lambda r: Fault(headers={"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:01 GMT"})]
    with pytest.raises(RemoteProblem, match="changed"):
        other.read(0, 10)


@pytest.mark.parametrize(
    ("status", "said", "hint"),
    [(401, "refuses it (401", "credentials"), (403, "refuses it (403", "credentials"), (404, "not there (404", "address")],
)
def test_final_answers_are_not_tried_again(file: HttpFile, web: Server, status: int, said: str, hint: str) -> None:
    web.faults.append(lambda r: Fault(status=status))
    with pytest.raises(RemoteProblem) as found:
        file.begin(10)
    assert said in found.value.message and hint in (found.value.hint or "") and len(web.log) == 1
    assert isinstance(found.value, Missing) == (status == 404)


def test_nobody_there(web: Server) -> None:
    with Server(web.folder) as gone:
        url = gone.url
    with pytest.raises(RemoteProblem, match=r"does not accept connections \(2 attempts\)"):
        HttpFile(parse(f"{url}/x")).begin(10)


def test_secrets_go_to_their_host_only_and_are_not_shown(web: Server, tmp_path: Path) -> None:
    (web.folder / "x").write_bytes(b"0123456789")
    file = HttpFile(parse(web.url.replace("//", "//me:s3cret@") + "/old?sig=hidden"))
    assert file.url == f"{web.url}/old"
    web.faults.append(lambda r: Fault(status=302, headers={"Location": f"{web.cdn}/x?a=1"}) if r.path == "/old" else None)
    assert file.begin(4) == b"0123"
    old, new = web.log
    assert old.query == "sig=hidden" and old.headers["Authorization"].startswith("Basic ")
    assert new.query == "a=1" and "Authorization" not in new.headers


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/x", "", "gopher://x"])
def test_redirects_stay_on_the_web(file: HttpFile, web: Server, location: str) -> None:
    web.faults.append(lambda r: Fault(status=302, headers={"Location": location}) if "x.safe" in r.path else None)
    with pytest.raises(RemoteProblem, match="redirects"):
        file.begin(4)


def test_redirects_in_a_circle_end(file: HttpFile, web: Server) -> None:
    web.faults.append(lambda r: Fault(status=307, headers={"Location": "/x.safetensors"}))
    with pytest.raises(RemoteProblem, match="redirects more than 5 times"):
        file.begin(4)


def test_an_address_that_expired_is_asked_for_again(web: Server) -> None:
    (web.folder / "real").write_bytes(CONTENT)
    signature = 0

    def redirect(request: Request) -> Fault | None:
        if request.path == "/front":
            return Fault(status=302, headers={"Location": f"{web.cdn}/real?s={signature}", "X-Linked-ETag": '"content"'})
        return None if request.query == f"s={signature}" else Fault(status=403)

    web.faults.append(redirect)
    file = HttpFile(parse(f"{web.url}/front"))
    file.begin(10)
    file.read(10, 10)
    assert [r.path for r in web.log] == ["/front", "/cdn/real", "/cdn/real"] and file.version == "content"
    signature = 1
    assert file.read(20, 10) == CONTENT[20:30]
    assert [r.path for r in web.log[3:]] == ["/cdn/real", "/front", "/cdn/real"]
    # another copy, with another tag, of the same content: the front says that it is
    web.faults[0] = lambda r: Fault(etag='"copy"') if r.path == "/cdn/real" else redirect(r)
    assert file.read(30, 10) == CONTENT[30:40]
    # another content: the front says so
    other = Fault(status=302, headers={"Location": f"{web.cdn}/real?s=1", "X-Linked-ETag": '"other"'})
    web.faults[0] = lambda r: Fault(etag='"third"') if r.path == "/cdn/real" else other
    with pytest.raises(RemoteProblem, match="its tag was content, it is other"):
        file.read(40, 10)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, (key, crt) = tmp_path / "both.pem", (tmp_path / "key", tmp_path / "crt")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1 -keyout"
    subprocess.run([*command.split(), key, "-out", crt], check=True, capture_output=True)
    pem.write_bytes(key.read_bytes() + crt.read_bytes())
    (tmp_path / "x").write_bytes(CONTENT)
    with Server(tmp_path, tls=str(pem)) as server:
        monkeypatch.setattr(connection, "_context", None)
        with pytest.raises(RemoteProblem, match="certificate is not trusted: self"):
            HttpFile(parse(f"{server.url}/x")).begin(10)
        assert not server.log
        monkeypatch.setattr(connection, "_context", None)
        monkeypatch.setenv("SSL_CERT_FILE", str(crt))
        file = HttpFile(parse(f"{server.url}/x"))
        assert file.begin(10) == CONTENT[:10] and file.read(1000, 200_000) == CONTENT[1000:201_000]
        server.faults.append(lambda r: Fault(status=302, headers={"Location": server.url.replace("https", "http")}))
        with pytest.raises(RemoteProblem, match="not a safe one"):
            file.read(0, 10)


def test_a_file_can_be_pickled(file: HttpFile) -> None:
    file.begin(10)
    assert pickle.loads(pickle.dumps(file)).read(5, 10) == CONTENT[5:15]


def test_reads_beyond_the_end_are_refused(file: HttpFile) -> None:
    file.begin(10)
    with pytest.raises(RemoteProblem, match="has 300000 bytes"):
        file.read(299_999, 2)


def test_proxies_of_the_environment_are_used(file: HttpFile, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//user:pass@"))
    monkeypatch.setenv("no_proxy", "")
    web.faults.append(lambda r: Fault(status=410))
    far = HttpFile(parse("http://models.invalid/a/x.safetensors"))
    with pytest.raises(Missing):
        far.begin(10)
    assert web.log[0].headers["Host"] == "models.invalid" and web.log[0].headers["Proxy-Authorization"].startswith("Basic ")
