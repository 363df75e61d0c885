/* SPDX-License-Identifier: BSD-3-Clause */
/* INFO kflex. docs/info.md says what each field means; a test compares both with abi.h. */
#include "kflex.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char *const STATS[KFLEX_STAT_COUNT] = {
	[KFLEX_STAT_SERVED_GET] = "served_get",
	[KFLEX_STAT_SERVED_SET] = "served_set",
	[KFLEX_STAT_PASSED] = "passed",
	[KFLEX_STAT_WHY_OFF] = "passed_off",
	[KFLEX_STAT_WHY_NEW] = "passed_new",
	[KFLEX_STAT_WHY_UNANSWERED] = "passed_unanswered",
	[KFLEX_STAT_WHY_UNREAD] = "passed_unread",
	[KFLEX_STAT_WHY_MULTI] = "passed_multi",
	[KFLEX_STAT_WHY_OTHER] = "passed_other",
	[KFLEX_STAT_WHY_SIZE] = "passed_size",
	[KFLEX_STAT_WHY_MISS] = "passed_miss",
	[KFLEX_STAT_WHY_GATE] = "passed_gate",
	[KFLEX_STAT_WHY_HELD] = "passed_held",
	[KFLEX_STAT_WHY_LOCKED] = "passed_locked",
	[KFLEX_STAT_WHY_FULL] = "passed_full",
	[KFLEX_STAT_WHY_NOMEM] = "passed_nomem",
	[KFLEX_STAT_WHY_BACKLOG] = "passed_backlog",
	[KFLEX_STAT_WHY_CLOSING] = "passed_closing",
	[KFLEX_STAT_WHY_USER] = "passed_user",
	[KFLEX_STAT_WHY_DEMOTED] = "passed_demoted",
	[KFLEX_STAT_DEMOTED] = "connections_demoted",
	[KFLEX_STAT_PAIRED] = "connections_paired",
	[KFLEX_STAT_LOST] = "lost_replies",
	[KFLEX_STAT_GATE_REPLY] = "gate_opened_by_reply",
	[KFLEX_STAT_GATE_SLEEP] = "gate_opened_by_sleep",
	[KFLEX_STAT_EVICTED] = "evicted_by_set",
	[KFLEX_STAT_PARKED] = "connections_parked",
	[KFLEX_STAT_RELEASED] = "connections_released",
};

static const char *const RULES[KFLEX_RULE_COUNT] = {
	[KFLEX_RULE_VERSION] = "version",     [KFLEX_RULE_MODULE] = "module",
	[KFLEX_RULE_CLUSTER] = "cluster",     [KFLEX_RULE_REPLICA] = "replica",
	[KFLEX_RULE_AUTH] = "auth",	      [KFLEX_RULE_RENAMED] = "renamed",
	[KFLEX_RULE_TIMEOUT] = "timeout",     [KFLEX_RULE_MONITOR] = "monitor",
	[KFLEX_RULE_PAUSED] = "paused",	      [KFLEX_RULE_LOADING] = "loading",
	[KFLEX_RULE_RECHECK] = "recheck",     [KFLEX_RULE_APPENDFSYNC] = "appendfsync",
	[KFLEX_RULE_MAXMEMORY] = "maxmemory", [KFLEX_RULE_MIN_REPLICAS] = "min_replicas",
	[KFLEX_RULE_NOTIFY] = "notify",	      [KFLEX_RULE_REPLICAS] = "replicas",
	[KFLEX_RULE_DISK] = "disk",	      [KFLEX_RULE_AOF_ERROR] = "aof_error",
	[KFLEX_RULE_TRACKING] = "tracking",   [KFLEX_RULE_SET_SETTING] = "set_setting",
	[KFLEX_RULE_JOURNAL] = "journal",
};

static const char *const STATES[] = {
	[KFLEX_ON] = "on",
	[KFLEX_DETACHED] = "detached",
	[KFLEX_STOPPING] = "stopping",
	[KFLEX_SERVER_GONE] = "server_gone",
	[KFLEX_UNLOADED] = "unloaded",
};

static const char *const SERVES[] = {
	[0] = "",
	[KFLEX_ALLOW_GET] = "get",
	[KFLEX_ALLOW_SET] = "set",
	[KFLEX_ALLOW_GET | KFLEX_ALLOW_SET] = "get,set",
};

#define NUMBER(name, value) RedisModule_InfoAddFieldULongLong(info, name, (unsigned long long)(value))
#define TEXT(name, value)   RedisModule_InfoAddFieldCString(info, name, (char *)(value))

static uint64_t total(enum kflex_stat what)
{
	uint64_t sum = 0;

	for (uint32_t cpu = 0; cpu < K.ctl->cpus; cpu++)
		sum += K.ctl->cpu[cpu].stat[what];
	return sum;
}

static void rules(RedisModuleInfoCtx *info)
{
	char names[512];
	size_t len = 0;
	uint32_t set = LOAD(K.ctl->rules);

	names[0] = 0;
	for (unsigned i = 0; i < KFLEX_RULE_COUNT; i++)
		if (set >> i & 1 && RULES[i] && len < sizeof(names))
			len += (size_t)snprintf(names + len, sizeof(names) - len, len ? ",%s" : "%s", RULES[i]);
	NUMBER("rules", set);
	TEXT("forbidden_by", names);
}

void kflex_info(RedisModuleInfoCtx *info, int crash)
{
	const struct kflex_ctl *ctl = K.ctl;
	/* A crash report, or a forked child: the mapping may not be there. */
	int readable = !crash && K.attached && getpid() == K.pid;
	uint32_t state = readable ? LOAD(ctl->disabled) : KFLEX_DETACHED;

	RedisModule_InfoAddSection(info, "");
	NUMBER("abi", KFLEX_ABI);
	NUMBER("attached", K.attached);
	TEXT("state", state < sizeof(STATES) / sizeof(*STATES) ? STATES[state] : "unknown");
	kflex_settings_info(info);
	NUMBER("recovered_keys", R.applied);
	NUMBER("recovery_kept", R.kept);
	TEXT("recovery", R.why);
	if (!readable)
		return;
	NUMBER("allow", LOAD(ctl->allow));
	TEXT("serves", SERVES[state == KFLEX_ON ? LOAD(ctl->allow) & 3 : 0]);
	rules(info);
	NUMBER("users_served", K.served_users);
	for (unsigned i = 0; i < KFLEX_STAT_COUNT; i++)
		if (STATS[i])
			NUMBER(STATS[i], total(i));
	NUMBER("dirty", LOAD(ctl->head) - ctl->tail);
	NUMBER("pending", ctl->tail - ctl->journal_head);
	NUMBER("durable", ctl->durable);
	NUMBER("last_cut", ctl->last_cut);
	NUMBER("last_cut_written", ctl->journal_cut);
	NUMBER("drained", ctl->drained);
	NUMBER("cuts", ctl->cuts);
	NUMBER("refused", ctl->refused);
	NUMBER("dirty_age_us_max", ctl->dirty_age_max / 1000);
	NUMBER("dirty_age_us_avg", ctl->cuts ? ctl->dirty_age_sum / ctl->cuts / 1000 : 0);
	NUMBER("populated", ctl->populated);
	NUMBER("invalidated", ctl->invalidated);
	NUMBER("evicted", ctl->evicted + total(KFLEX_STAT_EVICTED));
	NUMBER("epoch_bumps", ctl->epoch_bumps);
	NUMBER("open_commands", ctl->open_commands);
	NUMBER("writer_wait_us_max", ctl->wait_max / 1000);
	NUMBER("sleeps", ctl->sleeps);
	RedisModule_InfoAddFieldDouble(info, "gate_open_ratio",
				       ctl->total_ns ? (double)ctl->open_ns / (double)ctl->total_ns : 0);
	NUMBER("table_bytes", K.heap_bytes + K.bucket_bytes + K.ring_bytes);
	NUMBER("table_bytes_used", LOAD(ctl->bump) * KFLEX_CELL);
}
