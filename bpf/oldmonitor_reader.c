// SPDX-License-Identifier: GPL-2.0
/*
 * oldmonitor_reader - user space of oldmonitor.bpf.c: takes every perf event, woken for each, and counts commands.
 *
 *   oldmonitor_reader MAP_FD PAGES
 *
 * Says "ready" when it listens on every CPU; at SIGTERM, or when standard input ends, it takes what is left and prints one
 * line of JSON. It formats and prints nothing for the requests themselves: the old monitor did, so ours flatters it.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "oldmonitor.h"

#define MAX_CPUS 1024
#define COMMANDS 64

struct cpu {
	struct perf_event_mmap_page *page;
	char *data;
};

struct command {
	char name[24];
	unsigned long long count;
};

static struct cpu cpus[MAX_CPUS];
static struct pollfd polled[MAX_CPUS + 1];
static struct command commands[COMMANDS];
static unsigned long long taken, lost, kinds[OLDMON_KINDS], write_ns;
static volatile sig_atomic_t ending;

static void end(int number)
{
	(void)number;
	ending = 1;
}

static void count_command(const char *name, size_t length)
{
	struct command *c;

	for (c = commands; c < commands + COMMANDS; c++) {
		if (!c->name[0]) {
			for (size_t i = 0; i < length; i++)
				c->name[i] = toupper((unsigned char)name[i]);
		} else if (strlen(c->name) != length || strncasecmp(c->name, name, length)) {
			continue;
		}
		c->count++;
		return;
	}
}

/* The command of a request: "*2\r\n$3\r\nGET\r\n...". */
static void request(const struct oldmon_event *e)
{
	size_t have = e->size < OLDMON_PAYLOAD ? e->size : OLDMON_PAYLOAD;
	const char *at = memchr(e->payload, '$', have), *stop = e->payload + have;
	size_t length = 0;

	if (e->size <= 0 || e->payload[0] != '*' || !at)
		return;
	for (at++; at < stop && isdigit((unsigned char)*at); at++)
		length = length * 10 + (*at - '0');
	at += 2;
	for (size_t i = 0; i < length; i++)
		if (at + i >= stop || !isalpha((unsigned char)at[i]))
			return;
	if (length && length < sizeof(commands->name))
		count_command(at, length);
}

static void event(const struct oldmon_event *e)
{
	taken++;
	if (e->kind < OLDMON_KINDS)
		kinds[e->kind]++;
	if (e->kind == OLDMON_EXIT_READ)
		request(e);
	else if (e->kind == OLDMON_EXIT_WRITE)
		write_ns += e->duration;
}

static void copy_out(const struct cpu *c, size_t size, unsigned long long from, void *to, size_t length)
{
	size_t place = from & (size - 1), first = size - place < length ? size - place : length;

	memcpy(to, c->data + place, first);
	memcpy((char *)to + first, c->data, length - first);
}

static void take(struct cpu *c, size_t size)
{
	unsigned long long head = __atomic_load_n(&c->page->data_head, __ATOMIC_ACQUIRE);
	unsigned long long tail = c->page->data_tail;
	struct perf_event_header header;
	struct {
		unsigned int length;
		struct oldmon_event e;
	} __attribute__((packed)) sample;
	struct {
		unsigned long long id, count;
	} gap;
	struct oldmon_event e;

	while (tail < head) {
		copy_out(c, size, tail, &header, sizeof(header));
		if (header.type == PERF_RECORD_SAMPLE && header.size >= sizeof(header) + sizeof(sample)) {
			copy_out(c, size, tail + sizeof(header), &sample, sizeof(sample));
			memcpy(&e, &sample.e, sizeof(e));
			event(&e);
		} else if (header.type == PERF_RECORD_LOST) {
			copy_out(c, size, tail + sizeof(header), &gap, sizeof(gap));
			lost += gap.count;
		}
		tail += header.size;
	}
	__atomic_store_n(&c->page->data_tail, tail, __ATOMIC_RELEASE);
}

static int listen_on(int cpu, int map, size_t size, long page)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(attr),
		.config = PERF_COUNT_SW_BPF_OUTPUT,
		.sample_type = PERF_SAMPLE_RAW,
		.sample_period = 1,
		.wakeup_events = 1,
	};
	unsigned int key = cpu;
	int fd = syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);
	unsigned int value = fd;
	union bpf_attr update = {.map_fd = map, .key = (unsigned long)&key, .value = (unsigned long)&value};

	if (fd < 0)
		return -1;
	cpus[cpu].page = mmap(NULL, page + size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (cpus[cpu].page == MAP_FAILED)
		return -1;
	cpus[cpu].data = (char *)cpus[cpu].page + page;
	if (syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &update, sizeof(update)) < 0)
		return -1;
	polled[cpu] = (struct pollfd){.fd = fd, .events = POLLIN};
	return 0;
}

int main(int argc, char **argv)
{
	long page = sysconf(_SC_PAGESIZE), count = sysconf(_SC_NPROCESSORS_CONF);
	size_t size;
	struct sigaction action = {.sa_handler = end};
	int map;

	if (argc != 3 || count < 1 || count > MAX_CPUS)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	sigaction(SIGTERM, &action, NULL);
	signal(SIGINT, SIG_IGN);
	map = atoi(argv[1]);
	size = strtoul(argv[2], NULL, 10) * page;
	for (int cpu = 0; cpu < count; cpu++) {
		/* -1 is left out by poll; a CPU that is off has no events either. */
		polled[cpu].fd = -1;
		if (listen_on(cpu, map, size, page) && errno != ENODEV) {
			perror("oldmonitor_reader");
			return 1;
		}
	}
	polled[count] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
	puts("ready");
	fflush(stdout);
	while (!ending) {
		if (poll(polled, count + 1, -1) < 0 && errno != EINTR)
			return 1;
		if (polled[count].revents)
			break;
		for (int cpu = 0; cpu < count; cpu++)
			if (polled[cpu].revents)
				take(&cpus[cpu], size);
	}
	for (int cpu = 0; cpu < count; cpu++)
		if (cpus[cpu].data)
			take(&cpus[cpu], size);
	printf("{\"events\": %llu, \"lost\": %llu, \"writes\": %llu, \"write_ns\": %llu, \"commands\": {", taken, lost,
	       kinds[OLDMON_EXIT_WRITE], write_ns);
	for (int i = 0; i < COMMANDS && commands[i].name[0]; i++)
		printf("%s\"%s\": %llu", i ? ", " : "", commands[i].name, commands[i].count);
	puts("}}");
	return 0;
}
