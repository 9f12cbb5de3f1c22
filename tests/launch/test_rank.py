"""What becomes of one process of a job: the port that its ranks meet at, and the GPUs of a server."""

from __future__ import annotations

import socket

import pytest

from nemo_aapo.errors import RunError
from nemo_aapo.launch.slurm.rank import FIRST_PORT, PLACE, PORT_TRIES, PORTS, free_port, own_gpus


def test_a_port_in_use_is_passed_over_on_whatever_address_somebody_listens():
    start = next(n for n in range(7000, 9000) if [free_port(n + k) - n - k for k in range(3)] == [FIRST_PORT] * 3)
    with socket.create_server(("127.0.0.1", FIRST_PORT + start)), socket.create_server(("", FIRST_PORT + start + 1)):
        assert free_port(start) == FIRST_PORT + start + 2
    assert free_port(start + 3 * PORTS) == FIRST_PORT + start


def test_the_search_for_a_port_has_an_end(monkeypatch):
    tried = []

    def refuse(address, **options):
        tried.append(address[1])
        raise OSError

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(RunError, match="no port is free from 29990 on, 100 were tried"):
        free_port(14990)
    assert len(set(tried)) == PORT_TRIES
    assert set(tried) <= set(range(FIRST_PORT, FIRST_PORT + PORTS))


def test_servers_of_a_node_share_its_gpus():
    shares = [own_gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,3", PLACE: f"{place}/2"}) for place in range(2)]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert own_gpus({PLACE: "1/2"}) == {}
