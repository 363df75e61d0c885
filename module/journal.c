/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The journal: what the kernel has acknowledged and the AOF is not known to hold.
 *
 * RM_Call only fills Redis's AOF buffer, and the next beforeSleep writes it, up to 100 ms after the drain thread's cut. So
 * each cut carries its number into the AOF (a marker), and its entries stay in the table, PENDING or DROPPED, until the
 * cut is confirmed: the ring's positions from journal_head to tail. recover.c applies what a crash leaves there.
 */
#include "kflex.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECK_EVERY_NS 5000000

/* The name of a table's markers. No client's key begins like this by accident. */
void kflex_marker_name(uint64_t table_id, char name[KFLEX_MARKER + 1])
{
	memcpy(name, KFLEX_MARKER_PREFIX, 7);
	snprintf(name + 7, 17, "%016llx", (unsigned long long)table_id);
}

/*
 * Puts the number of the newest cut into the AOF, within the cut's own MULTI/EXEC: a SET and a DEL that are never executed
 * here. Their replay fires events that kflex.so sees, and leaves nothing in a server without it. Replicas do not get them.
 */
void kflex_journal_mark(RedisModuleCtx *ctx)
{
	char name[KFLEX_MARKER + 1];

	kflex_marker_name(K.ctl->table_id, name);
	RedisModule_Replicate(ctx, "SET", "Rbl", name, (size_t)KFLEX_MARKER, (long long)K.ctl->last_cut);
	RedisModule_Replicate(ctx, "DEL", "Rb", name, (size_t)KFLEX_MARKER);
}

/* Everything that was applied is safe. GIL held. */
void kflex_journal_confirm(void)
{
	struct kflex_ctl *ctl = K.ctl;
	uint64_t end = ctl->tail;

	for (uint64_t pos = ctl->journal_head; pos < end; pos++) {
		uint32_t cell = kflex_cell_of(pos), pending = KFLEX_PENDING;
		struct kflex_entry *e;

		if (!cell)
			continue;
		e = kflex_entry_at(cell);
		/* Fails for what a newer SET has made DIRTY again. */
		if (__atomic_compare_exchange_n(&e->state, &pending, KFLEX_CLEAN, 0, __ATOMIC_ACQ_REL,
						__ATOMIC_ACQUIRE))
			continue;
		if (pending == KFLEX_DROPPED)
			kflex_cell_free(cell);
	}
	ctl->journal_cut = ctl->last_cut;
	STORE(ctl->journal_head, end);
}

/* Has Redis written everything that it was to append? */
int kflex_aof_written(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *info = RedisModule_GetServerInfo(ctx, "persistence");
	const char *waiting = RedisModule_ServerInfoGetFieldC(info, "aof_buffer_length");
	int written = waiting && !strcmp(waiting, "0");

	RedisModule_FreeServerInfo(ctx, info);
	return written;
}

/*
 * An empty buffer says that everything applied before is written. Worth a look at the first change of the GIL's hands
 * after a beforeSleep: later in the same sleep it holds the cuts taken since.
 */
void kflex_journal_check(RedisModuleCtx *ctx)
{
	uint64_t now;

	if (!K.slept)
		return;
	K.slept = 0;
	if (!K.ctl->durable || (K.ctl->journal_head == K.ctl->tail && !K.unmarked))
		return;
	now = now_ns();
	if (now - K.checked_ns < CHECK_EVERY_NS && K.ctl->tail - K.ctl->journal_head < K.ctl->ring / 8)
		return;
	K.checked_ns = now;
	if (!kflex_aof_written(ctx))
		return;
	kflex_journal_confirm();
	if (K.unmarked) {
		K.unmarked = 0;
		kflex_rules_remove(KFLEX_RULE_JOURNAL);
	}
}

/* Redis 7.0's own (bio.h), which it exports to modules as it does all its symbols. */
#define BIO_AOF_FSYNC 1
extern unsigned long long bioPendingJobsOfType(int type) __attribute__((weak));

static int fsync_under_way(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *info;
	unsigned long long pending;
	int err;

	if (bioPendingJobsOfType)
		return bioPendingJobsOfType(BIO_AOF_FSYNC) != 0;
	info = RedisModule_GetServerInfo(ctx, "persistence");
	pending = RedisModule_ServerInfoGetFieldUnsigned(info, "aof_pending_bio_fsync", &err);
	RedisModule_FreeServerInfo(ctx, info);
	return err || pending;
}

/*
 * At BEFORE_SLEEP: will the commands' changes stay unwritten when their replies leave? With appendfsync everysec beforeSleep does
 * not write while an fsync is under way. A crash then takes those commands back, as it does without us; a SET that was
 * accepted after them must not outlive them.
 */
int kflex_journal_behind(RedisModuleCtx *ctx)
{
	if (!K.ctl->durable || !K.changed)
		return 0;
	if (fsync_under_way(ctx))
		return 1;
	K.changed = 0;
	return 0;
}

/* The AOF's file that is appended to: its number here, for the programs, and its inode. */
static void find_aof(void)
{
	DIR *fds = opendir("/proc/self/fd");
	struct dirent *d;
	long best = -1;

	K.ctl->aof_ino = 0;
	while (fds && (d = readdir(fds))) {
		int fd = atoi(d->d_name), mode = d->d_name[0] == '.' ? -1 : fcntl(fd, F_GETFL);
		char link[64], path[4096];
		const char *incr;
		struct stat st;
		ssize_t len;
		long seq;

		if (mode < 0 || (mode & (O_ACCMODE | O_APPEND)) != (O_WRONLY | O_APPEND) || fstat(fd, &st) ||
		    !S_ISREG(st.st_mode))
			continue;
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		len = readlink(link, path, sizeof(path) - 1);
		path[len < 0 ? 0 : len] = 0;
		/* NAME.SEQ.incr.aof, or temp-NAME.incr until the first rewrite ends: the newest is written to. */
		incr = strstr(path, ".incr");
		if (!incr)
			continue;
		for (seq = 0; incr > path && incr[-1] >= '0' && incr[-1] <= '9';)
			incr--;
		seq = *incr == '.' ? 1L << 60 : atol(incr);
		if (seq <= best)
			continue;
		best = seq;
		K.ctl->aof_fd = (uint32_t)fd;
		K.ctl->aof_ino = st.st_ino;
	}
	if (fds)
		closedir(fds);
}

/* AOF on or off, as the rules have just read. GIL held. */
void kflex_journal_durable(RedisModuleCtx *ctx, int durable)
{
	struct stat st;

	if (!durable) {
		K.unmarked = 0;
		K.ctl->aof_ino = 0;
		if (K.ctl->durable) {
			K.ctl->durable = 0;
			kflex_journal_confirm();
		}
		return;
	}
	if (!K.ctl->durable || !K.ctl->aof_ino || fstat((int)K.ctl->aof_fd, &st) || st.st_ino != K.ctl->aof_ino)
		find_aof();
	if (!K.ctl->durable) {
		K.ctl->durable = 1;
		/* SETs are accepted when the AOF names this table: recovery goes by that name. */
		K.unmarked = 1;
		kflex_journal_mark(ctx);
	}
}

/*
 * A child was forked: if it rewrites the AOF, what follows goes into a new file, which is to name the table too. Not here
 * but before the next sleep: a marker makes the command that forked (BGSAVE, PSYNC, ...) one that has changed data, and
 * Redis would propagate that command with it. No cut is taken between the two.
 */
void kflex_journal_forked(void)
{
	if (!K.ctl->durable)
		return;
	K.mark_due = 1;
	find_aof();
}
