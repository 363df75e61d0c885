/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef LIBBPF_BPF_H
#define LIBBPF_BPF_H

#include "libbpf.h"

struct bpf_map_create_opts {
	unsigned int map_flags;
};

int bpf_map_create(enum bpf_map_type map_type, const char *map_name, unsigned int key_size, unsigned int value_size,
		   unsigned int max_entries, const struct bpf_map_create_opts *opts);

#endif
