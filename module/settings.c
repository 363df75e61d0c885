/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The module's settings: kflex.NAME in redis.conf, CONFIG SET and CONFIG REWRITE; and `NAME value` as arguments of loadmodule.
 *
 * An argument takes the place of a setting's default. So CONFIG REWRITE is right: Redis writes the loadmodule line with
 * its arguments as it was, and a line kflex.NAME only for what differs from the default.
 */
#include "kflex.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum kind { SWITCH, MICROSECONDS, BYTES };

static struct setting {
	const char *name;
	enum kind kind;
	long long least, most; /* 0 is allowed besides for BYTES: it means "auto" */
	long long *value;
	long long fallback;
} settings[] = {
	{"drain-us", MICROSECONDS, 50, 15000, &K.settings.drain_us, 500},
	{"set-offload", SWITCH, 0, 1, &K.settings.set_offload, 1},
	{"set-with-replicas", SWITCH, 0, 1, &K.settings.set_with_replicas, 0},
	{"table-size", BYTES, KFLEX_TABLE_MIN_BYTES, KFLEX_TABLE_MAX_BYTES, &K.settings.table_size, 0},
};

#define NSETTINGS (sizeof(settings) / sizeof(*settings))

static int fits(const struct setting *s, long long value)
{
	return (value >= s->least && value <= s->most) || (s->kind == BYTES && !value);
}

static const char *expected(const struct setting *s, char *text, size_t size)
{
	if (s->kind == SWITCH)
		snprintf(text, size, "yes or no");
	else if (s->kind == BYTES)
		snprintf(text, size, "0 (auto), or %lldmb to %lldmb", s->least >> 20, s->most >> 20);
	else
		snprintf(text, size, "%lld to %lld", s->least, s->most);
	return text;
}

/* Bytes as redis.conf writes them: 1k is 1000, 1kb is 1024. Returns -1 for anything else. */
static long long parse_bytes(const char *text)
{
	static const struct {
		const char *unit;
		long long bytes;
	} units[] = {
		{"", 1},	{"b", 1},	 {"k", 1000},	    {"kb", 1 << 10},
		{"m", 1000000}, {"mb", 1 << 20}, {"g", 1000000000}, {"gb", 1 << 30},
	};
	char *end;
	long long number = strtoll(text, &end, 10);

	if (end == text || number < 0 || number > KFLEX_TABLE_MAX_BYTES)
		return -1;
	for (size_t i = 0; i < sizeof(units) / sizeof(*units); i++)
		if (!strcasecmp(end, units[i].unit))
			return number * units[i].bytes;
	return -1;
}

static long long parse(const struct setting *s, const char *text)
{
	char *end;
	long long number;

	if (s->kind == SWITCH)
		return !strcasecmp(text, "yes") ? 1 : !strcasecmp(text, "no") ? 0 : -1;
	if (s->kind == BYTES)
		return parse_bytes(text);
	number = strtoll(text, &end, 10);
	return end == text || *end ? -1 : number;
}

static struct setting *find(const char *name)
{
	for (size_t i = 0; i < NSETTINGS; i++)
		if (!strcasecmp(settings[i].name, name))
			return &settings[i];
	return NULL;
}

/* Arguments of loadmodule, in pairs. Says what is wrong with them, and returns -1 then. */
static int read_arguments(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
	char text[64];

	for (int i = 0; i < argc; i += 2) {
		const char *name = RedisModule_StringPtrLen(argv[i], NULL);
		const char *value = i + 1 < argc ? RedisModule_StringPtrLen(argv[i + 1], NULL) : "";
		struct setting *s = find(name);

		if (!s) {
			RedisModule_Log(
				ctx, "warning",
				"kflex: unknown argument '%s'; known: drain-us, set-offload, set-with-replicas, "
				"table-size, each with a value",
				name);
			return -1;
		}
		s->fallback = parse(s, value);
		if (!fits(s, s->fallback)) {
			RedisModule_Log(ctx, "warning", "kflex: %s takes %s, not '%s'", s->name,
					expected(s, text, sizeof(text)), value);
			return -1;
		}
	}
	return 0;
}

static long long get_number(const char *name, void *setting)
{
	(void)name;
	return *((const struct setting *)setting)->value;
}

static int get_switch(const char *name, void *setting)
{
	return (int)get_number(name, setting);
}

/* The rules follow by themselves: a CONFIG SET fires an event after it, and the filter has seen it before. */
static int set_number(const char *name, long long value, void *setting, RedisModuleString **error)
{
	const struct setting *s = setting;
	char text[64];

	(void)name;
	if (!fits(s, value)) {
		expected(s, text, sizeof(text));
		*error = RedisModule_CreateStringPrintf(NULL, "argument must be %s", text);
		return REDISMODULE_ERR;
	}
	/* The drain thread reads them without the GIL. */
	STORE(*s->value, value);
	return REDISMODULE_OK;
}

static int set_switch(const char *name, int value, void *setting, RedisModuleString **error)
{
	return set_number(name, value, setting, error);
}

/* In OnLoad only. Returns 0, or -1 when a value is wrong: it has then been logged, by us or by Redis. */
int kflex_settings_load(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
	if (read_arguments(ctx, argv, argc))
		return -1;
	for (size_t i = 0; i < NSETTINGS; i++) {
		struct setting *s = &settings[i];
		int made = s->kind == SWITCH
				   ? RedisModule_RegisterBoolConfig(ctx, s->name, (int)s->fallback,
								    REDISMODULE_CONFIG_DEFAULT, get_switch, set_switch,
								    NULL, s)
				   : RedisModule_RegisterNumericConfig(
					     ctx, s->name, s->fallback,
					     s->kind == BYTES ? REDISMODULE_CONFIG_MEMORY : REDISMODULE_CONFIG_DEFAULT,
					     s->kind == BYTES ? 0 : s->least, s->most, get_number, set_number, NULL, s);

		if (made != REDISMODULE_OK) {
			RedisModule_Log(ctx, "warning", "kflex: the server does not take the setting kflex.%s",
					s->name);
			return -1;
		}
	}
	return RedisModule_LoadConfigs(ctx) == REDISMODULE_OK ? 0 : -1;
}

/* setting_NAME, as CONFIG GET kflex.NAME has it. */
void kflex_settings_info(RedisModuleInfoCtx *info)
{
	char field[40];

	for (size_t i = 0; i < NSETTINGS; i++) {
		const struct setting *s = &settings[i];

		snprintf(field, sizeof(field), "setting_%s", s->name);
		for (char *c = field; *c; c++)
			if (*c == '-')
				*c = '_';
		if (s->kind == SWITCH)
			RedisModule_InfoAddFieldCString(info, field, *s->value ? "yes" : "no");
		else
			RedisModule_InfoAddFieldLongLong(info, field, *s->value);
	}
}
