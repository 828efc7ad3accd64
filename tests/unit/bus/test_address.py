"""A client whose address is a file follows the controller to wherever the file says."""

from __future__ import annotations

from pathlib import Path

from shared.bus.address import resolve

START_S = 5.0


def test_an_address_is_itself_and_a_file_tells_the_newest(tmp_path: Path) -> None:
    file = tmp_path / "controller.address"
    assert resolve("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"
    assert resolve(str(file)) == ""
    file.write_text("")
    assert resolve(str(file)) == ""
    file.write_text("tcp://10.0.0.1:7 3\n")
    assert resolve(str(file)) == "tcp://10.0.0.1:7"


def test_a_client_follows_a_controller_that_moves(tmp_path, open_desk, open_client, make_report, disk, wait):
    file = tmp_path / "controller.address"
    first = open_desk("tcp://127.0.0.1:*", writes=1)
    file.write_text(f"{first.address} 1\n")
    client = open_client(str(file))
    client.start(START_S)
    client.send(make_report(1))
    client.send(make_report(2))
    first.wait(lambda: first.seen[-1].envelope.sequence == 2)

    second = open_desk("tcp://127.0.0.1:*", term=2)  # while the first one is still there, and cut off
    file.write_text(f"{second.address} 2\n")
    wait(client, lambda: client.stats()["in_flight"] == 0)
    assert client.term == 2
    assert {message.group for message in disk.messages} == {1, 2}
