"""What each mode of the artifact's program really does.

Facts [read] in KFlex: src/Main.cpp, bpf/ffkx_redis.bpf.c, bpf/ffkx_memcached.bpf.c, bpf/ffkx_memcache.bpf.c.
"""

from __future__ import annotations

from dataclasses import dataclass

# Fixed in all three modes, in Main.cpp and as ffkx_*_dest_port in the BPF programs.
PORT = 6969


@dataclass(frozen=True)
class Mode:
    """One mode: its option, what it serves and where, what it does not, and the BPF object it loads."""

    name: str
    option: str
    title: str
    serves: tuple[str, ...]
    does_not: tuple[str, ...]
    object: str
    hooks: str
    interface: bool
    threads: int
    ready: str


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "kredis",
            "--kredis",
            "a toy server of sorted sets",
            ("PING", "ZADD", "ZRANGEBYLEX"),
            (
                "GET, SET and every other Redis command",
                "the members that were added: ZADD and ZRANGEBYLEX are both answered by the constant :1",
                "telling commands apart: P… is taken for PING, ZA… for ZADD, ZR… for ZRANGEBYLEX",
                "no redis-server is involved",
            ),
            "ffkx_redis.bpf.o",
            "sk_skb stream parser and verdict on a sockhash, sockops on the cgroup at /sys/fs/cgroup",
            False,
            1,
            "ToyRedis ready!",
        ),
        Mode(
            "kmemcached",
            "--kmemcached",
            "GET and SET in Redis's protocol (RESP), in spite of its name",
            (
                "GET: looked up, but answered by a constant of 64 × 'x', also where there is no such key",
                "SET",
            ),
            (
                "the value that was set: no reply ever holds it",
                "memcached's protocol",
                "no redis-server is involved",
            ),
            "ffkx_memcached.bpf.o",
            "sk_skb stream parser and verdict on a sockhash, sockops on the cgroup at /sys/fs/cgroup",
            False,
            16,
            "Memcached ready!",
        ),
        Mode(
            "kmemcache",
            "--kmemcache",
            "memcached's text protocol over UDP, by XDP on one network interface",
            (
                "get over UDP: looked up, but answered by a constant of 32 × 'x' under a constant key",
                "set over UDP",
            ),
            (
                "the value that was set: no reply ever holds it",
                "TCP: requests on the same port are carried out and dropped without an answer",
                "clients on the same host, unless they come in through that interface",
            ),
            "ffkx_memcache.bpf.o",
            "XDP on the interface, and the sockops and sk_skb of the other modes",
            True,
            16,
            "Memcache ready!",
        ),
    )
}

IFINDEX = (
    "--ifindex is the number of a network interface (`ip link` prints it before the name), not a count and "
    "not a port; only --mode kmemcache reads it, to attach its XDP program there"
)
