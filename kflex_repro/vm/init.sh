#!/bin/sh
# The guest's init, in the initramfs. ttyS0: console; ttyS1, ttyS2: what the command prints; ttyS3: to the host.
# /job: command (a script), env, release, and kind: "none" (stay here), "virtiofs" or "image".
b=/bin/busybox
export PATH=/bin
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev 2>/dev/null
$b echo 1 >/proc/sys/kernel/printk
say() { $b echo "$*" >/dev/ttyS3; }
fail() {
    say "failed $*"
    $b poweroff -f
}
for tty in 1 2 3; do $b stty -F /dev/ttyS$tty raw -echo 115200; done
# The host's end may be slow to read; what is written must not be lost at power-off.
read -r up _ </proc/uptime
say "booted $($b uname -r) $up"
for module in /modules/*; do
    [ ! -e "$module" ] || $b insmod "$module" 2>/dev/null
done
disk() {
    for tried in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        for block in /sys/block/nvme*; do
            serial=
            [ ! -e "$block/device/serial" ] || read -r serial <"$block/device/serial"
            if [ "$serial" = "$1" ]; then
                $b echo "/dev/${block##*/}"
                return 0
            fi
        done
        $b usleep 100000
    done
    return 1
}
kind=$($b cat /job/kind)
out=$(disk out)
root=
if [ "$kind" != none ]; then
    root=/new
    $b mount -t tmpfs -o mode=755 tmpfs /low
    $b mkdir -p /low/scratch
    $b mount -t ext4 "$(disk scratch)" /low/scratch || fail "the scratch disk cannot be mounted"
    lower=
    if [ "$kind" = virtiofs ]; then
        $b mkdir -p /low/host
        $b mount -t virtiofs -o ro host /low/host || fail "the host's root cannot be mounted (virtiofs)"
        lower=/low/host
    else
        for name in $($b cat /job/lower); do
            $b mkdir -p "/low/$name"
            $b mount -t ext4 -o ro,noload "$(disk "$name")" "/low/$name" || fail "the disk $name cannot be mounted"
            lower=$lower${lower:+:}/low/$name
        done
    fi
    $b mkdir -p /low/scratch/upper /low/scratch/work /low/scratch/tmp /low/scratch/out
    $b chmod 1777 /low/scratch/tmp
    $b mount -t overlay -o "lowerdir=$lower,upperdir=/low/scratch/upper,workdir=/low/scratch/work" overlay /new ||
        fail "the overlay cannot be mounted"
    for name in dev proc sys run tmp; do $b mkdir -p "/new/$name"; done
    $b mount -t tmpfs -o mode=755 tmpfs /new/run
    $b mkdir -p /new/run/lock /new/run/kflex-vm/bin /new/run/kflex-vm/tmp /new/run/kflex-vm/out
    # Not over /tmp: the checkout, or the cache, may be in the host's.
    $b mount --bind /low/scratch/tmp /new/run/kflex-vm/tmp
    $b mount --bind /low/scratch/out /new/run/kflex-vm/out
    if modules=$(disk modules); then
        release=$($b uname -r)
        $b mkdir -p "/new/lib/modules/$release"
        $b mount -t ext4 -o ro,noload "$modules" "/new/lib/modules/$release"
    fi
    $b cp /bin/busybox /new/run/kflex-vm/bin/busybox
    $b ln -s busybox /new/run/kflex-vm/bin/modprobe
    $b cp -r /job /new/run/kflex-vm/job
    $b echo /run/kflex-vm/bin/modprobe >/proc/sys/kernel/modprobe
    for name in dev proc sys; do $b mount --move "/$name" "/new/$name"; done
else
    $b mkdir -p /run/kflex-vm/out
    $b cp -r /job /run/kflex-vm/job
fi
$b cat >"$root/run/kflex-vm/main" <<'MAIN'
b=/run/kflex-vm/bin/busybox
[ -x $b ] || b=/bin/busybox
out=$1
say() { $b echo "$*" >/dev/ttyS3; }
mountpoint() { $b mkdir -p "$2" 2>/dev/null; $b mount -t "$1" -o "${3:-rw}" "$1" "$2" 2>/dev/null; }
mountpoint devpts /dev/pts mode=620,ptmxmode=666
$b ln -sf pts/ptmx /dev/ptmx 2>/dev/null
for link in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    [ -e "/dev/${link%%:*}" ] || $b ln -s "/proc/self/${link#*:}" "/dev/${link%%:*}"
done
mountpoint tmpfs /dev/shm mode=1777
mountpoint cgroup2 /sys/fs/cgroup
mountpoint bpf /sys/fs/bpf mode=700
mountpoint tracefs /sys/kernel/tracing
mountpoint debugfs /sys/kernel/debug
mountpoint securityfs /sys/kernel/security
$b ip link set lo up 2>/dev/null
ulimit -Hn 524288 2>/dev/null && ulimit -Sn 524288 2>/dev/null
$b hostname kflex-vm
$b echo 4096 >/proc/sys/net/core/somaxconn 2>/dev/null
# busybox's shell takes its own applets for the commands of these names: the host's shell does not.
shell=/bin/sh
[ -x /run/kflex-vm/bin/busybox ] || shell="$b sh"
. /run/kflex-vm/job/env
export KFLEX_OUT=/run/kflex-vm/out KFLEX_VM=1
read -r up _ </proc/uptime
say "ready $up"
if [ -e /run/kflex-vm/job/terminal ]; then
    $b stty -F /dev/ttyS1 sane rows "${LINES:-24}" cols "${COLUMNS:-80}"
    $b setsid -c $shell /run/kflex-vm/job/command </dev/ttyS1 >/dev/ttyS1 2>&1
    status=$?
else
    # Pipes, as the command must not think that it talks to a terminal.
    $b mkfifo /run/kflex-vm/1 /run/kflex-vm/2
    $b cat /run/kflex-vm/1 >/dev/ttyS1 &
    first=$!
    $b cat /run/kflex-vm/2 >/dev/ttyS2 &
    second=$!
    $shell /run/kflex-vm/job/command </dev/null >/run/kflex-vm/1 2>/run/kflex-vm/2
    status=$?
    # A process that the command left behind holds its pipes open: it is waited for no longer than this.
    ( $b sleep 5; $b kill $first $second ) >/dev/null 2>&1 </dev/null &
    wait $first $second 2>/dev/null
fi
[ -z "$out" ] || $b tar -C /run/kflex-vm/out -cf "$out" . 2>/dev/null || say "failed the files of \$KFLEX_OUT cannot be kept"
$b sync
say "status $status"
$b poweroff -f
MAIN
if [ -n "$root" ]; then
    exec $b switch_root /new /run/kflex-vm/bin/busybox sh /run/kflex-vm/main "$out"
fi
exec $b sh /run/kflex-vm/main "$out"
