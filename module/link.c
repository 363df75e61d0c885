/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The link to the toolkit, and the drain thread.
 *
 * The toolkit loads the BPF programs (it has the privilege, redis-server need not) and hands the maps' fds over an
 * abstract AF_UNIX socket named after the server's run id. The peer must be root or the server's own user.
 */
#include "kflex.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { FD_CTL, FD_HEAP, FD_BUCKETS, FD_RING, NFDS };

static void *map_fd(int fd, size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		return NULL;
	/* A snapshot's child must neither see nor keep these pages. */
	madvise(at, bytes, MADV_DONTFORK);
	return at;
}

size_t kflex_pages(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (bytes + page - 1) / page * page;
}

void kflex_unmap(void)
{
	if (K.ctl)
		munmap(K.ctl, kflex_pages(sizeof(*K.ctl)));
	if (K.heap)
		munmap(K.heap, K.heap_bytes);
	if (K.buckets)
		munmap(K.buckets, K.bucket_bytes);
	if (K.ring)
		munmap(K.ring, K.ring_bytes);
	K.ctl = NULL;
	K.heap = NULL;
	K.buckets = NULL;
	K.ring = NULL;
}

/* The sizes of the table's maps, as its control block says. */
void kflex_measure(void)
{
	K.heap_bytes = kflex_pages((size_t)K.ctl->chunks * (KFLEX_CHUNK_CELLS * KFLEX_CELL + KFLEX_CHUNK_SLACK));
	K.bucket_bytes = kflex_pages((size_t)K.ctl->buckets * sizeof(struct kflex_bucket));
	K.ring_bytes = kflex_pages((size_t)K.ctl->ring * sizeof(uint64_t));
}

/* GIL held. Returns 0 or a negative errno. */
static int attach(const int fds[NFDS], char *text, size_t size)
{
	if (K.attached) {
		snprintf(text, size, "this server is already attached to a table");
		return -EBUSY;
	}
	K.ctl = map_fd(fds[FD_CTL], kflex_pages(sizeof(*K.ctl)));
	if (!K.ctl || K.ctl->magic != KFLEX_MAGIC || K.ctl->abi != KFLEX_ABI) {
		snprintf(text, size, "the control block cannot be mapped or is of another ABI");
		goto fail;
	}
	kflex_measure();
	K.heap = map_fd(fds[FD_HEAP], K.heap_bytes);
	K.buckets = map_fd(fds[FD_BUCKETS], K.bucket_bytes);
	K.ring = map_fd(fds[FD_RING], K.ring_bytes);
	if (!K.heap || !K.buckets || !K.ring) {
		snprintf(text, size, "the table cannot be mapped: %s", strerror(errno));
		goto fail;
	}
	kflex_table_reset();
	K.ctl->gate = K.ctl->armed = 0;
	K.ctl->epoch++;
	K.ctl->oldest_ns = now_ns();
	K.sample_ns = K.armed_ns = 0;
	K.slept = K.mark_due = K.unmarked = 0;
	K.ctl->durable = 0;
	K.nremembered = 0;
	kflex_rules_attach(K.ctx);
	kflex_rules_check(K.ctx);
	K.attached = 1;
	STORE(K.ctl->disabled, KFLEX_ON);
	RedisModule_Log(K.ctx, "notice", "kflex: attached, %u MiB of table, rules 0x%x", K.ctl->chunks * 2,
			K.ctl->rules);
	return 0;
fail:
	kflex_unmap();
	return -EINVAL;
}

/* GIL held: nothing is served any more, and everything that was accepted is in Redis. */
void kflex_quiet(RedisModuleCtx *ctx, unsigned why)
{
	if (!K.attached)
		return;
	STORE(K.ctl->disabled, why);
	STORE(K.ctl->allow, 0);
	kflex_close_gate();
	kflex_drain(ctx, 0);
}

/* GIL held, by the link thread or without one: lets go of the table too. */
void kflex_detach(RedisModuleCtx *ctx, unsigned why)
{
	if (!K.attached)
		return;
	kflex_quiet(ctx, why);
	K.attached = 0;
	RedisModule_Log(ctx, "notice", "kflex: detached after %llu keys in %llu cuts",
			(unsigned long long)K.ctl->drained, (unsigned long long)K.ctl->cuts);
	kflex_unmap();
}

/* Takes the GIL, or returns 0 when the thread is to stop. The main thread may hold it while it waits for us to stop. */
static int take_gil(void)
{
	while (RedisModule_ThreadSafeContextTryLock(K.ctx) != REDISMODULE_OK) {
		if (atomic_load(&K.stop))
			return 0;
		usleep(50);
	}
	return 1;
}

static int peer_allowed(int fd)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len))
		return 0;
	return peer.uid == 0 || peer.uid == geteuid();
}

/*
 * Lets go of the table when the AOF holds all that was accepted: until then a killed server finds it there. Redis writes
 * at its next beforeSleep, at the latest 1/hz from now; not while a disk is slow (appendfsync everysec postpones). GIL
 * held, but for the pauses.
 */
static int detach_written(char *text, size_t size)
{
	kflex_quiet(K.ctx, KFLEX_STOPPING);
	for (int pauses = 0; K.attached && K.ctl->durable; pauses++) {
		kflex_journal_check(K.ctx);
		if (K.ctl->journal_head == K.ctl->tail)
			break;
		if (pauses == 600) {
			snprintf(text, size, "Redis has not written its AOF for 3 s; everything passes meanwhile");
			return -EAGAIN;
		}
		RedisModule_ThreadSafeContextUnlock(K.ctx);
		usleep(5000);
		if (!take_gil())
			return -ECANCELED;
	}
	kflex_detach(K.ctx, KFLEX_STOPPING);
	return 0;
}

static void serve_one(void)
{
	struct timeval limit = {.tv_sec = 2};
	struct kflex_msg m = {0};
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int) * NFDS)];
	} control;
	struct iovec iov = {&m, sizeof(m)};
	struct msghdr h = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	int fd = accept4(K.listen_fd, NULL, NULL, SOCK_CLOEXEC), fds[NFDS], nfds = 0;
	struct pollfd wait[2] = {{.events = POLLIN}, {.fd = K.wake_fd, .events = POLLIN}};
	struct cmsghdr *c;
	ssize_t got;

	if (fd < 0)
		return;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	/* MODULE UNLOAD, and so the server, does not wait for a peer that says nothing. */
	wait[0].fd = fd;
	if (poll(wait, 2, 2000) <= 0 || wait[1].revents) {
		close(fd);
		return;
	}
	got = recvmsg(fd, &h, MSG_CMSG_CLOEXEC | MSG_WAITALL);
	for (c = got > 0 ? CMSG_FIRSTHDR(&h) : NULL; c; c = CMSG_NXTHDR(&h, c)) {
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			nfds = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
			memcpy(fds, CMSG_DATA(c), (size_t)nfds * sizeof(int));
		}
	}
	m.text[0] = 0;
	m.status = -EINVAL;
	if (got != sizeof(m) || m.magic != KFLEX_MAGIC) {
		snprintf(m.text, sizeof(m.text), "not a kflex message");
	} else if (!peer_allowed(fd)) {
		m.status = -EPERM;
		snprintf(m.text, sizeof(m.text), "only root or the server's own user may attach");
	} else if (m.verb != KFLEX_DETACH && /* that has the same meaning in every version */
		   (m.abi != KFLEX_ABI || m.sizeof_ctl != sizeof(struct kflex_ctl) ||
		    m.sizeof_entry != sizeof(struct kflex_entry) || m.sizeof_bucket != sizeof(struct kflex_bucket))) {
		m.status = -EPROTO;
		snprintf(m.text, sizeof(m.text),
			 "the module has ABI %d (control block %zu bytes), the toolkit ABI %u (%u bytes)", KFLEX_ABI,
			 sizeof(struct kflex_ctl), m.abi, m.sizeof_ctl);
	} else if (m.verb == KFLEX_ATTACH && nfds != NFDS) {
		snprintf(m.text, sizeof(m.text), "%d file descriptors came, not %d", nfds, NFDS);
	} else if (m.verb == KFLEX_CLIENTS && nfds != 1) {
		snprintf(m.text, sizeof(m.text), "%d file descriptors came, not 1", nfds);
	} else if (take_gil()) {
		m.status = 0;
		if (m.verb == KFLEX_ATTACH)
			m.status = attach(fds, m.text, sizeof(m.text));
		else if (m.verb == KFLEX_DETACH)
			m.status = detach_written(m.text, sizeof(m.text));
		else if (m.verb == KFLEX_CLIENTS)
			m.status = kflex_clients(K.ctx, &m, fds[0]);
		else if (m.verb != KFLEX_QUERY)
			m.status = -EINVAL;
		m.attached = (__u32)K.attached;
		if (m.status != -ECANCELED)
			RedisModule_ThreadSafeContextUnlock(K.ctx);
	}
	m.magic = KFLEX_MAGIC;
	m.abi = KFLEX_ABI;
	m.table_size = (__u64)LOAD(K.settings.table_size);
	send(fd, &m, sizeof(m), MSG_NOSIGNAL);
	for (int i = 0; i < nfds; i++)
		close(fds[i]);
	close(fd);
}

/*
 * Redis wakes by itself only every 1/hz s: this thread brings SETs in meanwhile. It gets the GIL exactly while the main
 * thread sleeps; when it does not get it, the main thread is awake and has drained, or will on its next iteration.
 */
static void *link_thread(void *arg)
{
	struct pollfd p[2] = {{.fd = K.listen_fd, .events = POLLIN}, {.fd = K.wake_fd, .events = POLLIN}};
	unsigned idle = 0;

	(void)arg;
	/* The toolkit finds it by this name and raises its priority: setpriority() here would be death to a service with
	 * Debian's system call filter. */
	pthread_setname_np(pthread_self(), "kflex-drain");
	while (!atomic_load(&K.stop)) {
		/* Idle: look less often, still well within the 20 ms in which a SET is to be in Redis. */
		long us = idle > 200 ? 5000 : (long)LOAD(K.settings.drain_us);
		struct timespec pause = {us / 1000000, us % 1000000 * 1000};
		int n;

		if (!LOAD(K.attached))
			n = ppoll(p, 2, NULL, NULL);
		else
			n = ppoll(p, 2, &pause, NULL);
		if (n > 0 && p[0].revents)
			serve_one();
		if (!LOAD(K.attached))
			continue;
		/* Only this thread detaches while it runs, so the mapping is there. */
		if (LOAD(K.ctl->head) == LOAD(K.ctl->tail)) {
			idle++;
			continue;
		}
		idle = 0;
		if (RedisModule_ThreadSafeContextTryLock(K.ctx) != REDISMODULE_OK)
			continue;
		if (K.attached) {
			kflex_journal_check(K.ctx);
			kflex_drain(K.ctx, 1);
		}
		RedisModule_ThreadSafeContextUnlock(K.ctx);
	}
	return NULL;
}

int kflex_link_start(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *info = RedisModule_GetServerInfo(ctx, "server");
	const char *run_id = RedisModule_ServerInfoGetFieldC(info, "run_id");
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	int len;

	snprintf(K.run_id, sizeof(K.run_id), "%s", run_id ? run_id : "");
	RedisModule_FreeServerInfo(ctx, info);
	len = snprintf(at.sun_path + 1, sizeof(at.sun_path) - 1, "kflex-%s", K.run_id);
	K.listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	K.wake_fd = eventfd(0, EFD_CLOEXEC);
	if (K.listen_fd < 0 || K.wake_fd < 0 ||
	    bind(K.listen_fd, (struct sockaddr *)&at,
		 (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) ||
	    listen(K.listen_fd, 8)) {
		RedisModule_Log(ctx, "warning", "kflex: cannot listen on the abstract socket kflex-%s: %s", K.run_id,
				strerror(errno));
		goto fail;
	}
	K.ctx = RedisModule_GetDetachedThreadSafeContext(ctx);
	if (!pthread_create(&K.thread, NULL, link_thread, NULL))
		return 0;
	RedisModule_Log(ctx, "warning", "kflex: cannot start the drain thread");
	RedisModule_FreeThreadSafeContext(K.ctx);
fail:
	if (K.listen_fd >= 0)
		close(K.listen_fd);
	if (K.wake_fd >= 0)
		close(K.wake_fd);
	return -1;
}

void kflex_link_stop(void)
{
	uint64_t one = 1;

	atomic_store(&K.stop, 1);
	/* Cannot fail: the counter is far from its limit. Nobody's code may go while the thread runs in it. */
	while (write(K.wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(K.thread, NULL);
	close(K.listen_fd);
	close(K.wake_fd);
	RedisModule_FreeThreadSafeContext(K.ctx);
}
