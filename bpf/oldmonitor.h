/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* oldmonitor.h - the record of oldmonitor.bpf.c, which oldmonitor_reader.c reads. */
#ifndef KFLEX_OLDMONITOR_H
#define KFLEX_OLDMONITOR_H

enum oldmon_kind {
	OLDMON_ENTER_READ,
	OLDMON_EXIT_READ,
	OLDMON_ENTER_WRITE,
	OLDMON_EXIT_WRITE,
	OLDMON_KINDS,
};

enum oldmon_const {
	OLDMON_PAYLOAD = 256,
};

struct oldmon_event {
	unsigned long long at;	     /* ns, CLOCK_MONOTONIC */
	unsigned long long duration; /* of the call, ns; 0 when it begins */
	long long size;		     /* asked for when it begins, done when it ends */
	unsigned int tid;
	unsigned int kind;
	char payload[OLDMON_PAYLOAD];
};

#endif
