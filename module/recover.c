/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Recovery: what a killed server's kernel half had acknowledged, and its AOF does not hold.
 *
 * The table outlives the server, pinned on bpffs. Whoever comes next on the same dataset replays the AOF, meets the table's
 * name and the number of the last cut in it (the markers of journal.c), and applies what is newer, in order, before the
 * first client's command.
 * Only where AOF and table are of one piece: anything else is left for `kflex-repro offload recover --export`.
 */
#include "kflex.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <mntent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct kflex_recovery R;

/* A key's event while the AOF is replayed: is it a marker? */
void kflex_recover_marker(RedisModuleCtx *ctx, const char *event, RedisModuleString *key)
{
	RedisModuleCallReply *reply;
	size_t len, vlen;
	const char *name = RedisModule_StringPtrLen(key, &len), *value;

	if (len != KFLEX_MARKER || memcmp(name, KFLEX_MARKER_PREFIX, 7) || strcmp(event, "set"))
		return;
	reply = RedisModule_Call(ctx, "GET", "s", key);
	value = reply ? RedisModule_CallReplyStringPtr(reply, &vlen) : NULL;
	if (value && vlen < 21) {
		char id[17] = "", number[21] = "";

		memcpy(id, name + 7, 16);
		memcpy(number, value, vlen);
		R.marker_id = strtoull(id, NULL, 16);
		R.marker_cut = strtoull(number, NULL, 10);
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
}

static int get_pinned(const char *path)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.pathname = (uint64_t)(uintptr_t)path;
	return (int)syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr));
}

/* A seccomp filter may kill whoever calls bpf(): let a child find out. */
static int bpf_allowed(void)
{
	int status = -1;
	pid_t child = fork();

	if (!child) {
		get_pinned("");
		_exit(0);
	}
	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return child > 0 && WIFEXITED(status);
}

static void *map_pinned(const char *dir, const char *name, size_t bytes, int *err)
{
	char path[512];
	void *at = NULL;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = get_pinned(path);
	if (fd < 0) {
		*err = errno;
		return NULL;
	}
	at = mmap(NULL, kflex_pages(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED) {
		*err = errno;
		at = NULL;
	}
	close(fd);
	return at;
}

/* The very process that owned the table still runs. */
static int owner_alive(const struct kflex_ctl *ctl)
{
	char path[64], text[1024], *at;
	unsigned long long started = 0;
	FILE *f;

	if (ctl->disabled == KFLEX_SERVER_GONE)
		return 0;
	snprintf(path, sizeof(path), "/proc/%u/stat", ctl->pid);
	f = fopen(path, "r");
	if (!f)
		return 0;
	at = fgets(text, sizeof(text), f) ? strrchr(text, ')') : NULL;
	fclose(f);
	/* proc(5): 19 fields from the state, the third, to the start time, the 22nd. */
	for (int field = 0; at && field < 20; field++)
		at = strchr(at + 1, ' ');
	if (at)
		started = strtoull(at, NULL, 10);
	return started == ctl->start_time;
}

/*
 * The AOF file that the dead server was appending to, if it is the newest of its directory that holds anything: a rewrite
 * opens the next one before it forks, and the module learns of it after the fork.
 */
static int last_aof(RedisModuleCtx *ctx, uint64_t ino, struct stat *st)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "CONFIG", "cc", "GET", "appenddirname");
	char dir[1024] = "", path[2048];
	long last = -1, other = -1;
	struct dirent *d;
	DIR *files;

	if (reply && RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ARRAY &&
	    RedisModule_CallReplyLength(reply) == 2) {
		size_t len;
		const char *text = RedisModule_CallReplyStringPtr(RedisModule_CallReplyArrayElement(reply, 1), &len);

		if (text && len < sizeof(dir))
			memcpy(dir, text, len);
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	files = *dir ? opendir(dir) : NULL; /* relative to dir, which is where the server works */
	while (files && (d = readdir(files))) {
		char *incr = strstr(d->d_name, ".incr.aof");
		struct stat one;
		long seq;

		if (!incr || incr[9])
			continue;
		while (incr > d->d_name && incr[-1] >= '0' && incr[-1] <= '9')
			incr--;
		seq = atol(incr);
		snprintf(path, sizeof(path), "%s/%s", dir, d->d_name);
		if (stat(path, &one))
			continue;
		if (one.st_ino == ino) {
			last = seq;
			*st = one;
		} else if (one.st_size && seq > other) {
			other = seq;
		}
	}
	if (files)
		closedir(files);
	return last > other;
}

/* Why what the table holds must not be applied, NULL: it may. */
static const char *foreign(RedisModuleCtx *ctx, const struct kflex_ctl *ctl, int aof)
{
	struct stat st = {0};

	if (!ctl->durable)
		return "it was accepted without AOF, which promises nothing";
	if (!aof)
		return "this server has no AOF";
	if (RedisModule_GetContextFlags(ctx) & REDISMODULE_CTX_FLAGS_SLAVE)
		return "this server is a replica";
	if (R.marker_id != ctl->table_id)
		return R.marker_id ? "the AOF names another table: another dataset, or written since"
				   : "the AOF does not name its table: another dataset";
#ifndef KFLEX_BREAK_NO_CUT_NUMBER
	if (R.marker_cut >= ctl->gen)
		return NULL; /* all of it is in the AOF: a server that had recovered it ended before it could say so */
	if (R.marker_cut < ctl->journal_cut)
		return "the AOF is older than the table: an earlier copy, or cut off before what had been written";
#endif
	if (!ctl->death_ino || ctl->death_ino != ctl->aof_ino)
		return NULL; /* the hook that notes it was off, or the file just closed: the marker must do */
	if (!last_aof(ctx, ctl->death_ino, &st))
		return "the AOF was rewritten or copied since the server ended";
	if ((uint64_t)st.st_size > ctl->death_size)
		return "another server has written to the AOF since";
	return NULL;
}

/* Brings in, in the order of acceptance, what is newer than the AOF's last cut; all of it is one MULTI/EXEC. */
static uint64_t apply(RedisModuleCtx *ctx)
{
	struct kflex_ctl *ctl = K.ctl;
	uint64_t applied = 0;

	for (uint64_t pos = ctl->journal_head; pos != ctl->head; pos++) {
		uint32_t cell = kflex_cell_of(pos), state;
		RedisModuleCallReply *reply;
		struct kflex_entry *e;
		const char *key;

		if (!cell)
			continue;
		e = kflex_entry_at(cell);
		state = e->state;
		if (state != KFLEX_PENDING && state != KFLEX_DIRTY && state != KFLEX_ORPHAN && state != KFLEX_DROPPED)
			continue;
#ifndef KFLEX_BREAK_NO_CUT_NUMBER
		if (e->cut <= R.marker_cut)
			continue;
#endif
		if (e->klen > KFLEX_MAX_KEY || e->vlen > KFLEX_MAX_VALUE)
			continue;
		key = (const char *)e->data;
		reply = RedisModule_Call(ctx, "SET", "!bb", key, (size_t)e->klen, key + ((e->klen + 7) & ~7),
					 (size_t)e->vlen);
		if (!reply || RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ERROR)
			RedisModule_Log(ctx, "warning", "kflex: Redis refused a key that is to be recovered");
		else
			applied++;
		if (reply)
			RedisModule_FreeCallReply(reply);
	}
	if (applied) {
		/* Another crash before this is confirmed: the marker says that it is in. */
		ctl->last_cut = ctl->gen;
		kflex_journal_mark(ctx);
	}
	return applied;
}

static void leave(RedisModuleCtx *ctx, const char *dir, const char *why, uint64_t entries)
{
	R.kept += entries;
	snprintf(R.why, sizeof(R.why), "%s", why);
	RedisModule_Log(
		ctx, "warning",
		"kflex: up to %llu SETs that the kernel had accepted stay in %s: %s. kflex-repro offload recover "
		"--export FILE saves them",
		(unsigned long long)entries, dir, why);
}

/* One pinned table; one of another port is ours if the AOF names it. */
static void look_at(RedisModuleCtx *ctx, const char *dir, unsigned port, int aof)
{
	const char *why;
	int err = 0;

	K.ctl = map_pinned(dir, "ctl", sizeof(*K.ctl), &err);
	if (!K.ctl) {
		if ((unsigned)atoi(strrchr(dir, '/') + 1) == port)
			leave(ctx, dir, err == EACCES || err == EPERM ? "this server may not open it" : strerror(err),
			      0);
		return;
	}
	if (K.ctl->magic != KFLEX_MAGIC || K.ctl->abi != KFLEX_ABI || K.ctl->mode != KFLEX_MODE_COHERENT ||
	    (K.ctl->port != port && K.ctl->table_id != R.marker_id) || owner_alive(K.ctl) ||
	    K.ctl->journal_head == K.ctl->head)
		goto out;
	R.tables++;
	/* Nobody serves for it any more, also if the hook that says so was off; and whoever still writes, finishes. */
	if (K.ctl->disabled != KFLEX_SERVER_GONE)
		STORE(K.ctl->disabled, KFLEX_SERVER_GONE);
	STORE(K.ctl->gate, 0);
	STORE(K.ctl->allow, 0);
	kflex_wait_for_writers(K.ctl);
	why = foreign(ctx, K.ctl, aof);
	if (why) {
		leave(ctx, dir, why, K.ctl->head - K.ctl->journal_head);
		goto out;
	}
	kflex_measure();
	K.heap = map_pinned(dir, "heap", K.heap_bytes, &err);
	K.ring = map_pinned(dir, "ring", K.ring_bytes, &err);
	if (!K.heap || !K.ring) {
		leave(ctx, dir, strerror(err), K.ctl->head - K.ctl->journal_head);
		goto out;
	}
	R.applied = apply(ctx);
	RedisModule_Log(ctx, "notice", "kflex: recovered %llu SETs newer than cut %llu, the last one in the AOF",
			(unsigned long long)R.applied, (unsigned long long)R.marker_cut);
	R.waiting = K.ctl;
	K.ctl = NULL;
out:
	kflex_unmap();
}

/* What recovery applied is in the AOF: the old table holds nothing any more. */
void kflex_recover_written(RedisModuleCtx *ctx)
{
	if (!kflex_aof_written(ctx))
		return;
	R.waiting->recovered = R.applied;
	STORE(R.waiting->journal_head, R.waiting->head);
	kflex_recover_let_go();
}

/* Of the old table, also when it is not known yet whether the AOF holds all of it: then the journal stays as it is. */
void kflex_recover_let_go(void)
{
	if (R.waiting)
		munmap(R.waiting, kflex_pages(sizeof(*R.waiting)));
	R.waiting = NULL;
}

static void look_in(RedisModuleCtx *ctx, const char *mount, unsigned port, int aof)
{
	const char *last = strrchr(mount, '/');
	char root[256], dir[600];
	struct dirent *d;
	DIR *all;
	int allowed = 0;

	/* A service sees our directory alone, bound to a place that its user can reach (offload install). */
	snprintf(root, sizeof(root), "%s%s", mount, last && !strcmp(last, "/kflex") ? "" : "/kflex");
	all = opendir(root);
	while (all && (d = readdir(all))) {
		if (!atoi(d->d_name)) /* PORT-RUNID */
			continue;
		snprintf(dir, sizeof(dir), "%s/%s", root, d->d_name);
		if (!allowed && !(allowed = bpf_allowed())) {
			if ((unsigned)atoi(d->d_name) == port)
				leave(ctx, dir, "this server may not call bpf(2)", 0);
			break;
		}
		look_at(ctx, dir, port, aof);
	}
	if (all)
		closedir(all);
}

/* At the first beforeSleep, when the dataset has been loaded. */
void kflex_recover(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *server, *persistence;
	struct mntent *m;
	unsigned port;
	int err, aof;
	FILE *mounts;

	if (RedisModule_GetContextFlags(ctx) & REDISMODULE_CTX_FLAGS_LOADING)
		return;
	R.done = 1;
	server = RedisModule_GetServerInfo(ctx, "server");
	persistence = RedisModule_GetServerInfo(ctx, "persistence");
	port = (unsigned)RedisModule_ServerInfoGetFieldUnsigned(server, "tcp_port", &err);
	aof = RedisModule_ServerInfoGetFieldUnsigned(persistence, "aof_enabled", &err) == 1;
	RedisModule_FreeServerInfo(ctx, server);
	RedisModule_FreeServerInfo(ctx, persistence);
	mounts = setmntent("/proc/self/mounts", "r");
	while (mounts && !R.waiting && (m = getmntent(mounts)))
		if (!strcmp(m->mnt_type, "bpf"))
			look_in(ctx, m->mnt_dir, port, aof);
	if (mounts)
		endmntent(mounts);
}
