"""Two hosts are two even if they have one name."""

import socket

from ringattn.transport import peer_memory


def test_a_host_is_its_name_and_its_last_start(tmp_path, monkeypatch):
    names = []
    for number in ("one", "two"):
        (tmp_path / number).write_text(f"{number}\n")
        monkeypatch.setattr(peer_memory, "_BOOT", tmp_path / number)
        names.append(peer_memory.host_name())
    assert names == [f"{socket.gethostname()} (boot one)", f"{socket.gethostname()} (boot two)"]
    monkeypatch.setattr(peer_memory, "_BOOT", tmp_path / "missing")
    assert peer_memory.host_name() == socket.gethostname()
