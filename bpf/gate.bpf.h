/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The gate: SETs are accepted only while Redis executes nothing (docs/offload.md).
 *
 * The module arms it in BEFORE_SLEEP. It opens at the main thread's next reply (beforeSleep of Redis 7.0 writes replies
 * after everything that may execute a command) or when the main thread goes to sleep in epoll, whichever is first; the
 * module closes it in AFTER_SLEEP. Both openers run in the main thread's own context, so neither races with closing.
 */
#ifndef KFLEX_GATE_BPF_H
#define KFLEX_GATE_BPF_H

#include "maps.bpf.h"

#define TASK_INTERRUPTIBLE 1

#if defined(__TARGET_ARCH_x86)
#define SYS_EPOLL_WAIT	 232
#define SYS_EPOLL_PWAIT	 281
#define SYS_EPOLL_PWAIT2 441
#define SYS_SPLICE	 275
#define SYSCALL_NR(regs) ((regs)->orig_ax)
#else
/* Elsewhere the seqlock of table.bpf.h needs read barriers too, which BPF has not before load-acquire (6.15). */
#error "only x86-64 so far"
#endif

/* A reply leaves: called in the context of whoever sends on a server socket. */
static __always_inline void gate_reply(struct kflex_ctl *k)
{
	if (!READ_ONCE(k->armed) || READ_ONCE(k->gate) || (__u32)bpf_get_current_pid_tgid() != k->tid)
		return;
	WRITE_ONCE(k->gate, 1);
	count(k, KFLEX_STAT_GATE_REPLY);
}

SEC("tp_btf/sched_switch")
int BPF_PROG(kflex_switch, bool preempt, struct task_struct *prev)
{
	struct kflex_ctl *k = get_ctl();
	struct pt_regs *regs;
	unsigned long nr;

	if (!k || prev->pid != k->tid || !READ_ONCE(k->armed) || READ_ONCE(k->gate) || preempt)
		return 0;
	if (READ_ONCE(k->disabled) || prev->__state != TASK_INTERRUPTIBLE)
		return 0;
	regs = (struct pt_regs *)bpf_task_pt_regs(prev);
	nr = SYSCALL_NR(regs);
	if (nr != SYS_EPOLL_WAIT && nr != SYS_EPOLL_PWAIT && nr != SYS_EPOLL_PWAIT2)
		return 0;
	WRITE_ONCE(k->gate, 1);
	count(k, KFLEX_STAT_GATE_SLEEP);
	return 0;
}

/* The lease: reads need a living owner. */
static __always_inline void end_lease(struct task_struct *p)
{
	struct kflex_ctl *k = get_ctl();

	if (!k || p->pid != k->tid)
		return;
	WRITE_ONCE(k->gate, 0);
	WRITE_ONCE(k->armed, 0);
	WRITE_ONCE(k->disabled, KFLEX_SERVER_GONE);
}

/*
 * How long the AOF was when its server ended: recovery may only follow what that server itself wrote. Runs before the
 * task's files are closed (do_exit).
 */
static __always_inline void note_death(struct task_struct *p)
{
	struct kflex_ctl *k = get_ctl();
	struct file **fds, *f = NULL;
	struct inode *inode;
	__u64 fd;

	if (!k || p->pid != k->tid || !k->aof_ino)
		return;
	fd = k->aof_fd;
	if (fd >= BPF_CORE_READ(p, files, fdt, max_fds))
		return;
	fds = BPF_CORE_READ(p, files, fdt, fd);
	bpf_probe_read_kernel(&f, sizeof(f), &fds[fd]);
	if (!f)
		return;
	inode = BPF_CORE_READ(f, f_inode);
	k->death_size = BPF_CORE_READ(inode, i_size);
	k->death_ino = BPF_CORE_READ(inode, i_ino);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(kflex_exit, struct task_struct *p)
{
	note_death(p);
	end_lease(p);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(kflex_exec, struct task_struct *p)
{
	end_lease(p);
	return 0;
}

#endif
