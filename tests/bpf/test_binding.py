"""The libbpf binding against the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kflex_repro.bpf import Link, Map, Object, Program, VerifierError, fs, libbpf
from kflex_repro.bpf.libbpf import AttachType, MapType, ProgType
from kflex_repro.errors import KflexError

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]

KITCHEN = r"""
enum colour { RED = 1, GREEN = 200, NEGATIVE = -3 };
struct inner { __u8 a; __u64 b; };
struct entry {
    __u32 lock;
    enum colour colour;
    char key[5];
    struct inner inner[2];
    __u64 *pointer;
    union { __u16 half; __u64 whole; };
    _Bool flag;
    __u64 far __attribute__((aligned(64)));
};
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(map_flags, BPF_F_MMAPABLE); __uint(max_entries, 10);
         __type(key, __u32); __type(value, struct entry); } table SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(map_flags, BPF_F_MMAPABLE); __uint(max_entries, 1);
         __uint(key_size, 4); __uint(value_size, 12); } odd SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __type(key, __u64); __type(value, __u32); }
    hash SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 2); __type(key, __u32);
         __type(value, __u32); } percpu SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_QUEUE); __uint(max_entries, 2); __type(value, __u64); } queue SEC(".maps");

const volatile __u32 limit = 7;
const volatile __s16 small = 1;
const volatile _Bool wanted = 0;
__u64 counter = 5;
__u64 seen;

SEC("tp_btf/sched_switch")
int on_switch(__u64 *context)
{
    __sync_fetch_and_add(&seen, 1);
    return 0;
}

SEC("xdp")
int answer(struct xdp_md *context)
{
    __u32 zero = 0;
    struct entry *entry = bpf_map_lookup_elem(&table, &zero);
    if (entry)
        entry->far = limit;
    return (wanted ? 1000 : 0) + limit + small;
}
char LICENSE[] SEC("license") = "GPL";
"""

SOCKETS = r"""
struct { __uint(type, BPF_MAP_TYPE_SOCKMAP); __uint(max_entries, 2); __type(key, __u32);
         __type(value, __u64); } socks SEC(".maps");
__u64 established;
__u64 messages;

SEC("sockops")
int enrol(struct bpf_sock_ops *s)
{
    __u32 zero = 0;
    if (s->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
        __sync_fetch_and_add(&established, 1);
        bpf_sock_map_update(s, &socks, &zero, BPF_ANY);
    }
    return 1;
}

SEC("sk_msg")
int verdict(struct sk_msg_md *m)
{
    __sync_fetch_and_add(&messages, 1);
    return SK_PASS;
}
char LICENSE[] SEC("license") = "GPL";
"""

ITERATOR = r"""
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, __u32); __type(value, __u32); }
    pairs SEC(".maps");
#define CORE __attribute__((preserve_access_index))
struct bpf_iter__bpf_map_elem { void *meta; void *map; void *key; void *value; } CORE;
struct bpf_iter_meta { struct seq_file *seq; } CORE;

SEC("iter/bpf_map_elem")
int dump(struct bpf_iter__bpf_map_elem *context)
{
    struct bpf_iter_meta *meta = context->meta;
    __u32 *key = context->key, *value = context->value;
    if (!key || !value)
        return 0;
    __u32 pair[2] = { *key, *value };
    bpf_seq_write(meta->seq, pair, sizeof(pair));
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""

REFUSED = r"""
SEC("xdp")
int leap(struct xdp_md *context)
{
    return *(volatile int *)((char *)(long)context->data + 8);
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture(scope="session")
def kitchen(compile_bpf) -> Path:
    return compile_bpf("kitchen", KITCHEN)


@pytest.fixture(scope="session")
def sockets(compile_bpf) -> Path:
    return compile_bpf("sockets", SOCKETS)


def u64(data: memoryview, at: int = 0) -> int:
    return struct.unpack_from("<Q", data, at)[0]


def bss(obj: Object, name: str) -> int:
    variable = obj.btf.variables(".bss")[name]
    value = obj.maps[".bss"].get(bytes(4))
    assert value is not None
    return int.from_bytes(value[variable.offset : variable.offset + variable.size], "little")


def test_names_types_and_sizes_before_and_after_load(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        assert {"table", "odd", "hash", "percpu", "queue", ".rodata", ".data", ".bss"} <= set(obj.maps)
        assert set(obj.programs) == {"on_switch", "answer"}
        assert obj.programs["answer"].type == ProgType.XDP
        assert obj.programs["on_switch"].section == "tp_btf/sched_switch"
        table = obj.maps["table"]
        before = (
            table.name,
            table.type,
            table.key_size,
            table.value_size,
            table.max_entries,
            table.map_flags,
        )
        with pytest.raises(KflexError, match="not in the kernel"):
            _ = table.fd
        obj.load()
        assert before == (
            table.name,
            table.type,
            table.key_size,
            table.value_size,
            table.max_entries,
            table.map_flags,
        )
        assert before == ("table", MapType.ARRAY, 4, 192, 10, libbpf.BPF_F_MMAPABLE)
        assert table.type_name == "array" and table.id > 0 and table.fd > 0
        assert obj.programs["answer"].id > 0
    with pytest.raises(KflexError, match="not in the kernel"):
        _ = table.fd
    obj.close()


def test_rodata_reaches_the_program(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.set_rodata(limit=40, small=-2, wanted=True)
        obj.load()
        assert obj.programs["answer"].test_run(bytes(64)) == (1038, bytes(64))
        with pytest.raises(KflexError, match="once the object is loaded"):
            obj.set_rodata(limit=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"nothing": 1}, "no variable"), ({"limit": 1 << 32}, "fit"), ({"limit": -1}, "fit")],
)
def test_rodata_refuses_what_it_cannot_hold(kitchen: Path, values: dict[str, int], message: str) -> None:
    with Object.open(kitchen) as obj, pytest.raises(KflexError, match=message):
        obj.set_rodata(**values)


def test_data_has_initial_values(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.set_data(counter=99)
        obj.load()
        value = obj.maps[".data"].get(bytes(4))
        assert value is not None and int.from_bytes(value[:8], "little") == 99


def test_sizes_can_be_set_before_load_only(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.maps["table"].set_max_entries(100)
        obj.maps["odd"].set_value_size(4000)
        obj.load()
        assert obj.maps["table"].info.max_entries == 100
        assert obj.maps["odd"].info.value_size == 4000
        with pytest.raises(KflexError, match="before load"):
            obj.maps["table"].set_max_entries(5)


def test_mapping_shows_what_programs_and_lookups_see(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        table = obj.maps["table"]
        entry = obj.btf.struct("entry")
        with table.mmap() as view:
            assert len(view) == 4096 and not view.readonly
            obj.programs["answer"].test_run(bytes(64))
            assert entry.from_buffer(view).far == 7
            third = entry.from_buffer(view, 3 * table.stride)
            third.inner[1].b = 0x1122334455667788
            third.key[:] = b"a\0b\0c"
            raw = table.get((3).to_bytes(4, "little"))
            assert raw is not None
            copy = entry.from_buffer_copy(raw)
            assert copy.inner[1].b == 0x1122334455667788 and bytes(copy.key) == b"a\0b\0c"
            del third, copy
        with table.mmap(writable=False) as view:
            assert view.readonly and u64(view, entry.far.offset) == 7
        assert obj.maps["odd"].stride == 16
        with pytest.raises(KflexError, match="MMAPABLE"):
            obj.maps["hash"].mmap()


def test_mapping_outlives_the_object(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        view = obj.maps["table"].mmap()
    view[0] = 5
    assert view[0] == 5


def test_layouts_from_btf(kitchen: Path) -> None:
    from kflex_repro.bpf import btf

    for types in (btf.load(kitchen), Object.open(kitchen).btf):
        entry = types.struct("entry")
        assert ctypes.sizeof(entry) == 192
        offsets = {
            name: getattr(entry, name).offset for name in ("colour", "key", "inner", "flag", "far", "half")
        }
        assert offsets == {"colour": 4, "key": 8, "inner": 16, "flag": 64, "far": 128, "half": 56}
        assert types.enum("colour") == {"RED": 1, "GREEN": 200, "NEGATIVE": -3}
        assert types.constants()["GREEN"] == 200
        assert types.struct("entry") is entry
        assert "entry" in types and "nonsense" not in types
        with pytest.raises(KflexError, match="no type nonsense"):
            types.struct("nonsense")
        made = entry(colour=-3, flag=True)
        made.whole = 0x10002
        assert made.colour == -3 and made.half == 2 and made.flag is True


def test_hash_entries(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        entries = obj.maps["hash"]
        key = (9).to_bytes(8, "little")
        assert entries.get(key) is None and entries.delete(key) is False
        entries.update(key, b"abcd")
        assert entries.get(key) == b"abcd"
        with pytest.raises(KflexError) as caught:
            entries.update(key, b"abcd", libbpf.BPF_NOEXIST)
        assert caught.value.errno == errno.EEXIST
        more = [number.to_bytes(8, "little") for number in range(3)]
        for other in more:
            entries.update(other, b"1234")
        assert sorted(entries.keys()) == sorted([key, *more])
        with pytest.raises(KflexError) as caught:
            entries.update(b"too many", b"1234")
        assert caught.value.errno == errno.E2BIG
        with pytest.raises(KflexError, match="a key of 1 bytes"):
            entries.get(b"x")
        with pytest.raises(KflexError, match="a value of 1 bytes"):
            entries.update(key, b"x")
        assert entries.delete(key) is True


def test_per_cpu_values(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        percpu = obj.maps["percpu"]
        values = percpu.lookup(bytes(4))
        assert isinstance(values, list) and set(values) == {bytes(4)}
        wanted = [number.to_bytes(4, "little") for number in range(len(values))]
        percpu.update(bytes(4), wanted)
        assert percpu.lookup(bytes(4)) == wanted


def test_queue(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        queue = obj.maps["queue"]
        assert queue.pop() is None
        queue.push(b"first..1")
        queue.push(b"second.2")
        with pytest.raises(KflexError) as caught:
            queue.push(b"third..3")
        assert caught.value.errno == errno.E2BIG
        assert [queue.pop(), queue.pop(), queue.pop()] == [b"first..1", b"second.2", None]


def test_tracepoint_runs_and_is_counted(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        program = obj.programs["on_switch"]
        with libbpf.run_statistics(), program.attach() as link:
            assert link.id > 0 and link.prog_id == program.id
            subprocess.run(["true"], check=True)
            assert program.run_cnt > 0 and program.run_time_ns > 0
        after = bss(obj, "seen")
        assert after > 0
        subprocess.run(["true"], check=True)
        assert bss(obj, "seen") == after


def test_pins_of_maps_programs_and_links(kitchen: Path, bpffs: Path) -> None:
    home = bpffs / "kflex" / "server"
    with Object.open(kitchen) as obj:
        obj.load()
        obj.maps["hash"].pin(home / "hash")
        obj.programs["on_switch"].pin(home / "program")
        link = obj.programs["on_switch"].attach()
        link.pin(home / "link")
        ids = (obj.maps["hash"].id, obj.programs["on_switch"].id, link.id)
        link.destroy()
        link.destroy()
    with Map.from_pin(home / "hash") as entries, Program.from_pin(home / "program") as program:
        entries.update(bytes(8), b"here")
        assert entries.get(bytes(8)) == b"here"
        opened = Link.from_pin(home / "link")
        assert (entries.id, program.id, opened.id) == ids
        assert (entries.name, program.name, program.type) == ("hash", "on_switch", ProgType.TRACING)
        with pytest.raises(KflexError, match="is a map, not a link"):
            Link.from_pin(home / "hash")
        with pytest.raises(KflexError) as caught:
            entries.pin(home / "program")
        assert caught.value.errno == errno.EEXIST
        for thing in (entries, program, opened):
            thing.unpin()
            thing.unpin()
        opened.destroy()
    assert list(home.iterdir()) == []
    with pytest.raises(KflexError, match="ENOENT"):
        Map.from_pin(home / "hash")


def test_pin_outside_bpffs_says_so(kitchen: Path, tmp_path: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.load()
        with pytest.raises(KflexError, match="not on a bpffs"):
            obj.maps["hash"].pin(tmp_path / "hash")


def test_objects_can_share_a_map(kitchen: Path) -> None:
    with Object.open(kitchen) as one, Object.open(kitchen) as two:
        one.load()
        two.maps["table"].reuse(one.maps["table"])
        two.programs["on_switch"].set_autoload(False)
        two.load()
        assert two.maps["table"].id == one.maps["table"].id
        with pytest.raises(KflexError):
            _ = two.programs["on_switch"].fd


def test_created_map_needs_no_object() -> None:
    with Map.create(MapType.HASH, 4, 4, 2, name="made_here") as made:
        made.update(b"key.", b"val.")
        assert (made.name, made.get(b"key.")) == ("made_here", b"val.")
    with pytest.raises(KflexError, match="bpf_map_create failed, EINVAL"):
        Map.create(MapType.HASH, 0, 0, 0)


CONNECT = """
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write("0")
client = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
for _ in range(3):
    client.sendall(b"ping")
    client.recv(1)
"""


def test_sockops_enrols_into_a_sockmap_and_sk_msg_sees_the_messages(sockets: Path, cgroup: Path) -> None:
    with Object.open(sockets) as obj, socket.create_server(("127.0.0.1", 0)) as server:
        obj.load()
        socks, verdict = obj.maps["socks"], obj.programs["verdict"]
        verdict.attach_map(socks, AttachType.SK_MSG_VERDICT)
        link = obj.programs["enrol"].attach_cgroup(cgroup)
        port = server.getsockname()[1]
        client = subprocess.Popen([sys.executable, "-c", CONNECT, str(cgroup), str(port)])
        try:
            server.settimeout(10)
            peer, _ = server.accept()
            with peer:
                peer.settimeout(10)
                for _ in range(3):
                    assert peer.recv(4) == b"ping"
                    peer.send(b"+")
                assert client.wait(10) == 0
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        assert (bss(obj, "established"), bss(obj, "messages")) == (1, 3)
        verdict.detach_map(socks, AttachType.SK_MSG_VERDICT)
        with pytest.raises(KflexError, match="bpf_prog_detach2"):
            verdict.detach_map(socks, AttachType.SK_MSG_VERDICT)
        link.detach()
        link.destroy()


def test_sockops_wants_a_cgroup(sockets: Path, tmp_path: Path) -> None:
    with Object.open(sockets) as obj:
        obj.load()
        with pytest.raises(KflexError, match="not a cgroup v2"):
            obj.programs["enrol"].attach_cgroup(tmp_path)
        with pytest.raises(KflexError, match="ENOENT"):
            obj.programs["enrol"].attach_cgroup(tmp_path / "missing")


def test_pinned_sockops_can_be_attached(sockets: Path, cgroup: Path, bpffs: Path) -> None:
    with Object.open(sockets) as obj:
        obj.load()
        obj.programs["enrol"].pin(bpffs / "enrol")
    with Program.from_pin(bpffs / "enrol") as program, program.attach_cgroup(cgroup) as link:
        assert link.prog_id == program.id


def test_map_iterator(compile_bpf) -> None:
    with Object.open(compile_bpf("iterator", ITERATOR)) as obj:
        obj.load()
        pairs = {number: number * 10 for number in range(5)}
        for key, value in pairs.items():
            obj.maps["pairs"].update(struct.pack("<I", key), struct.pack("<I", value))
        with obj.programs["dump"].attach_iter(obj.maps["pairs"]) as link:
            assert dict(struct.iter_unpack("<II", link.read_iter())) == pairs


def test_verifier_refusal_shows_reason_and_log(compile_bpf, capfd: pytest.CaptureFixture[str]) -> None:
    with Object.open(compile_bpf("refused", REFUSED)) as obj, pytest.raises(VerifierError) as caught:
        obj.load()
    error = caught.value
    assert error.program == "leap"
    assert "invalid access to packet" in error.reason
    assert "R1=ctx" in error.log and "processed" in error.log and len(error.log.splitlines()) > 3
    assert "\n" not in str(error) and "invalid access to packet" in str(error)
    assert capfd.readouterr().err == "", "libbpf's own printing must stay quiet"


def test_other_load_failures_give_libbpfs_reason(kitchen: Path) -> None:
    with Object.open(kitchen) as obj:
        obj.maps["table"].set_max_entries(1 << 31)
        with pytest.raises(KflexError, match=r"ENOMEM.*map 'table': failed to create"):
            obj.load()


def test_missing_and_damaged_objects(tmp_path: Path) -> None:
    with pytest.raises(KflexError, match="no such BPF object"):
        Object.open(tmp_path / "none.o")
    damaged = tmp_path / "damaged.o"
    for content in (b"", b"\x7fELF", os.urandom(4096)):
        damaged.write_bytes(content)
        with pytest.raises(KflexError, match="not a usable BPF object"):
            Object.open(damaged)


def test_without_privileges_the_error_says_root(kitchen: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from kflex_repro.bpf import Object, libbpf; from kflex_repro.errors import KflexError\n"
        "libbpf.library(); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n Object.open(Path(sys.argv[1])).load()\n"
        "except KflexError as error: print(error)\n"
    )
    kitchen.chmod(0o644)
    readable = Path("/tmp") / f"kflex-test-{os.getpid()}.o"
    readable.write_bytes(kitchen.read_bytes())
    try:
        out = subprocess.run(
            [sys.executable, "-c", script, str(readable)], check=True, capture_output=True, text=True
        )
    finally:
        readable.unlink()
    assert "EPERM" in out.stdout and "run as root" in out.stdout


def test_mounts_are_found() -> None:
    root = fs.cgroup2_root()
    assert root is not None and (root / "cgroup.procs").exists()
