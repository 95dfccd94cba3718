"""Clients and rooms of the chaos runs, undisturbed: a clean history, and the checker is proved on it."""

import threading

import pytest

from tests.chaos.checker import check
from tests.chaos.clients import Clients, Options
from tests.chaos.history import read
from tests.chaos.instance import Instance
from tests.chaos.planting import prove_checker

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    with Instance(tmp_path_factory.mktemp("clients"), "--hosts", "2") as instance:
        yield instance
        assert instance.stop() == 0


def test_an_undisturbed_run_is_clean_and_proves_the_checker(instance):
    options = Options(
        port=instance.port,
        folder=str(instance.folder),
        connections=30,
        rooms=3,
        rate=400,
        churn=8,
        large=0.03,
        messages=1500,
        seed=3,
    )
    assert Clients(options).run()
    events = read(instance.folder)
    report = check(events)
    assert report.findings == []
    assert prove_checker(events, seed=3) == []
    assert report.counts["messages"] >= 1500
    assert report.counts["answers"] > 0.9 * report.counts["messages"]
    assert report.counts["connections"] == report.counts["closes"] > 30
    assert report.counts["deliveries"] > report.counts["broadcasts"] > 100
    kinds = {event.detail[0] for event in events if event.event == "send"}
    assert kinds == set("espLlcbtxf")
    ways = {event.detail for event in events if event.event == "leave"}
    assert ways == {"close", "reset", "half"}


def test_a_handshake_that_is_refused_is_tried_again_under_another_name(tmp_path):
    """Against a port that answers nobody's first request."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            for _ in range(3):
                connection, _ = listener.accept()
                connection.recv(4096)
                connection.close()
            listener.close()

        server = threading.Thread(target=hang_up)
        server.start()
        port = listener.getsockname()[1]
        options = Options(
            port=port, folder=str(tmp_path), connections=1, rooms=1, rate=0, churn=0, messages=1
        )
        clients = Clients(options)
        while server.is_alive():
            clients._turn() if clients._known else clients._connect(0)
        server.join()
        clients._log.flush()
        names = [event.connection for event in read(tmp_path) if event.event == "connect"]
        assert len(set(names)) == len(names) >= 3
        for client in list(clients._clients.values()):
            clients._forget(client)
        clients._epoll.close()
        clients._log.__exit__()
