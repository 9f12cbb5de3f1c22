"""The directory where trainer and servers meet: private, one token for all, no half-written announcements."""

from __future__ import annotations

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish, read_servers, withdraw
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils import token


@pytest.mark.parametrize("hard_links", [True, False])
def test_all_who_come_at_once_get_the_same_token_and_nothing_is_left_beside_it(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", no_link)
        monkeypatch.setattr(token, "WRITTEN_WITHIN_S", 60.0)  # of a machine that others load
    for round_ in range(20):
        directory = open_directory(tmp_path / str(round_))
        with ThreadPoolExecutor(8) as pool:
            tokens = set(pool.map(lambda _: open_token(directory), range(8)))  # noqa: B023
        assert len(tokens) == 1
        assert [path.name for path in directory.iterdir()] == ["token"]
    assert len(tokens.pop()) >= 43  # 32 random bytes


def no_link(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_without_hard_links_the_first_token_stays_too(tmp_path, monkeypatch):
    def link(*_):
        if comes_first:
            (directory / "token").write_text("a" * 43)
            (directory / "token").chmod(0o600)
        no_link()

    monkeypatch.setattr(os, "link", link)
    for comes_first in (True, False):
        directory = open_directory(tmp_path / str(comes_first))
        first = open_token(directory)
        assert (first == "a" * 43) == comes_first
        assert open_token(directory) == first
        assert [path.name for path in directory.iterdir()] == ["token"]


def test_directory_token_and_announcement_are_for_this_user_alone(tmp_path):
    directory = open_directory(tmp_path / "servers")
    open_token(directory)
    publish(directory, ServerRecord(3, "http://127.0.0.1:80", 1, "a"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.iterdir()]}
    assert modes == {"servers": 0o700, "token": 0o600, "server_3.json": 0o600}


@pytest.mark.parametrize("name", ["servers", "servers/token"])
@pytest.mark.parametrize("mode", [0o040, 0o004, 0o020])
def test_what_others_can_read_or_write_is_refused(tmp_path, name, mode):
    directory = open_directory(tmp_path / "servers")
    open_token(directory)
    (tmp_path / name).chmod((tmp_path / name).stat().st_mode | mode)
    with pytest.raises(ConfigError, match=rf"{name}: open to others .*chmod go= "):
        open_token(open_directory(tmp_path / "servers"))


def test_a_token_that_is_being_written_is_waited_for_and_one_that_stays_empty_is_refused_as_such(tmp_path, monkeypatch):
    directory = open_directory(tmp_path / "servers")
    path = directory / "token"
    path.touch(mode=0o600)
    monkeypatch.setattr(token, "WRITTEN_WITHIN_S", 0.2)
    with pytest.raises(ConfigError, match=r"token: empty for 0\.2 s: .* was killed\. End what uses this directory"):
        open_token(directory)
    monkeypatch.setattr(token, "WRITTEN_WITHIN_S", 60.0)
    writer = threading.Timer(0.3, path.write_text, ["a" * 43])
    writer.start()
    assert open_token(directory) == "a" * 43
    writer.join()
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"not a token .*a new one is made"):
        open_token(directory)


def test_a_restarted_server_replaces_its_announcement_and_the_old_one_does_not_take_it_away(tmp_path):
    directory = open_directory(tmp_path / "servers")
    old, new = (ServerRecord(1, f"http://127.0.0.1:{port}", port, str(port)) for port in (80, 81))
    other = ServerRecord(0, "http://[::1]:82", 82, "82")
    for record in (old, other, new):
        publish(directory, record)
    withdraw(directory, old)
    assert read_servers(directory) == [other, new]
    withdraw(directory, new)
    assert read_servers(directory) == [other]


@pytest.mark.parametrize(
    "content", ["", "{}", '{"index": 0, "address": "https://u@x/", "pid": 1, "instance": "a"}'], ids=str
)
def test_what_no_server_wrote_is_refused_by_name(tmp_path, content):
    (tmp_path / "server_0.json").write_text(content)
    with pytest.raises(ConfigError, match=r"server_0\.json"):
        read_servers(tmp_path)
