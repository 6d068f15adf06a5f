"""The environment is read strictly, and refused with the name of the variable."""

from __future__ import annotations

import socket

import pytest
import torch

from collectives import (
    GroupMisuse,
    Rendezvous,
    RendezvousFailed,
    RendezvousInvalid,
    join,
    read_rendezvous,
)
from collectives.bootstrap import NO_MULTICAST, apply_settings, required_settings

GOOD = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_good_environment_is_read() -> None:
    expected = Rendezvous(
        rank=1, size=2, local_rank=1, address="127.0.0.1", port=29500, timeout_s=5.0
    )
    assert read_rendezvous(GOOD, timeout_s=5.0) == expected
    assert expected.is_loopback


def test_names_are_resolved_and_torchrun_is_recognised() -> None:
    environ = {**GOOD, "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rendezvous = read_rendezvous(environ)
    assert rendezvous.address == "127.0.0.1"
    assert rendezvous.is_hosted


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [None, ""])
def test_each_variable_is_needed(name: str, value: str | None) -> None:
    environ = {key: text for key, text in GOOD.items() if key != name}
    if value is not None:
        environ[name] = value
    with pytest.raises(RendezvousInvalid, match=f"^{name}: (missing|empty)"):
        read_rendezvous(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "-1"),
        ("RANK", "2"),
        ("RANK", "one"),
        ("RANK", "01"),
        ("RANK", "１"),
        ("RANK", "1\n"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "2.0"),
        ("WORLD_SIZE", "99999999999"),
        ("LOCAL_RANK", "2"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_ADDR", "8.8.8.8"),
        ("MASTER_ADDR", "0.0.0.0"),
        ("MASTER_ADDR", "::"),
        ("MASTER_ADDR", "2001:4860:4860::8888"),
        ("MASTER_ADDR", "224.0.0.1"),
        ("MASTER_ADDR", "255.255.255.255"),
    ],
)
def test_malformed_values_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(RendezvousInvalid, match=f"^{name}: ") as caught:
        read_rendezvous({**GOOD, name: value})
    assert "\n" not in str(caught.value)
    assert "limit" in str(caught.value)


@pytest.mark.parametrize("address", ["10.1.2.3", "172.16.0.9", "192.168.1.1", "::1", "fd00::1"])
def test_private_addresses_are_accepted(address: str) -> None:
    assert read_rendezvous({**GOOD, "MASTER_ADDR": address}).address == address


def test_a_host_name_is_no_address_of_a_rendezvous() -> None:
    with pytest.raises(RendezvousInvalid, match="MASTER_ADDR: 'somewhere'"):
        Rendezvous(rank=0, size=1, local_rank=0, address="somewhere", port=1)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_the_deadlines_are_finite(timeout_s: float) -> None:
    with pytest.raises(RendezvousInvalid, match=r"^timeout_s"):
        read_rendezvous(GOOD, timeout_s=timeout_s)
    with pytest.raises(RendezvousInvalid, match=r"^operation_timeout_s"):
        read_rendezvous(GOOD, operation_timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("timeout_s", "operation_timeout_s", "limit_s"),
    [(30.0, None, 20.0), (5.0, None, 5.0), (5.0, 60.0, 60.0), (60.0, 2.0, 2.0)],
)
def test_operations_have_a_deadline_of_their_own(
    timeout_s: float, operation_timeout_s: float | None, limit_s: float
) -> None:
    rendezvous = read_rendezvous(GOOD, timeout_s=timeout_s, operation_timeout_s=operation_timeout_s)
    assert rendezvous.operation_limit_s == limit_s


def test_loopback_binds_to_loopback_and_multicast_is_off_everywhere() -> None:
    near = required_settings(read_rendezvous(GOOD))
    far = required_settings(read_rendezvous({**GOOD, "MASTER_ADDR": "10.0.0.1"}))
    assert near["GLOO_SOCKET_IFNAME"] == near["NCCL_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in far
    assert NO_MULTICAST.items() <= near.items() & far.items()
    # The host is not held up by a wait, and NCCL's watchdog leaves the process alone.
    assert (far["TORCH_NCCL_BLOCKING_WAIT"], far["TORCH_NCCL_ASYNC_ERROR_HANDLING"]) == ("0", "2")


def test_settings_are_set_and_agreeing_ones_kept() -> None:
    environ = {"HOME": "/x", "NCCL_NVLS_ENABLE": "0"}
    apply_settings(environ, NO_MULTICAST)
    assert environ == {"HOME": "/x", **NO_MULTICAST}


def test_what_torchrun_sets_by_itself_gives_way() -> None:
    environ = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    apply_settings(environ, required_settings(read_rendezvous(GOOD)))
    assert environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"


@pytest.mark.parametrize("name", NO_MULTICAST)
def test_a_contrary_setting_is_refused_by_name(name: str) -> None:
    environ = {name: "2"}
    with pytest.raises(RendezvousInvalid, match=f"^{name}: '2' is set"):
        apply_settings(environ, NO_MULTICAST)
    assert environ == {name: "2"}


@pytest.fixture(name="port")
def find_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port; what `join` sets in the environment is undone after the test."""
    settings = required_settings(read_rendezvous(GOOD))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come_are_told(port: int, rank: int) -> None:
    rendezvous = Rendezvous(
        rank=rank, size=2, local_rank=rank, address="127.0.0.1", port=port, timeout_s=1.0
    )
    with (
        pytest.raises(RendezvousFailed, match=f"rank {rank} of 2 at 127.0.0.1:{port}") as caught,
        join(rendezvous),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_told(port: int) -> None:
    rendezvous = Rendezvous(rank=0, size=1, local_rank=0, address="127.0.0.1", port=port)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(RendezvousFailed, match="in use"),
        join(rendezvous),
    ):
        pass


def fail_inside(rendezvous: Rendezvous) -> None:
    with join(rendezvous) as group:
        assert (group.rank, group.size, group.is_broken) == (0, 1, False)
        with pytest.raises(GroupMisuse, match="a process group exists"), join(rendezvous):
            pass
        for ranks in ([], [1], [0, 0], [-1]):
            with pytest.raises(GroupMisuse, match="ascending ranks"):
                group.subgroup(ranks)
        raise ZeroDivisionError


def test_a_process_joins_once_and_leaves_even_on_error(port: int) -> None:
    rendezvous = Rendezvous(rank=0, size=1, local_rank=0, address="127.0.0.1", port=port)
    with pytest.raises(ZeroDivisionError):
        fail_inside(rendezvous)
    assert not torch.distributed.is_initialized()
