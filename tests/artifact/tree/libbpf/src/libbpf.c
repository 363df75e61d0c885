// SPDX-License-Identifier: BSD-3-Clause
/* The parts of libbpf that the tests need: where arenas are mapped, and a heap map gets its user address. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "libbpf.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#ifndef roundup
#define roundup(x, y) (((x) + (y) - 1) / (y) * (y))
#endif

static unsigned long long bpf_map_mmap_sz(struct bpf_map const *map)
{
	return map->max_entries * 4096ull;
}

static int bpf_object__create_maps(struct bpf_object *obj)
{
	const int flags = MAP_SHARED | MAP_FIXED_NOREPLACE;
	unsigned int i;

	for (i = 0; i != obj->nr_maps; ++i) {
		struct bpf_map *map = obj->maps + i;
		unsigned long long size = bpf_map_mmap_sz(map), try, base;
		void *got = MAP_FAILED;

		if (map->type != BPF_MAP_TYPE_HEAP)
			continue;
		base = roundup(1UL << 48, size);
		for (try = 0; base && try < 1024; try++, base -= size) {
			got = mmap((void *)base, size, PROT_READ | PROT_WRITE, flags, map->fd, 0);
			if (got != MAP_FAILED)
				break;
		}
		if (got == MAP_FAILED) {
			int err = -errno;

			fprintf(stderr, "libbpf: no address for heap map '%s' after %llu tries: %s\n",
				map->name, try, strerror(-err));
			return err;
		}
		map->heap_addr = got;
	}
	for (i = 0; i != obj->nr_maps; ++i) {
		struct bpf_map *map = obj->maps + i;

		if (map->type != BPF_MAP_TYPE_ARENA)
			continue;
		map->mmaped = mmap(NULL, bpf_map_mmap_sz(map), PROT_READ | PROT_WRITE, MAP_SHARED, map->fd, 0);
		if (map->mmaped == MAP_FAILED)
			return -errno;
	}
	return 0;
}

int bpf_object__load(struct bpf_object *obj)
{
	return bpf_object__create_maps(obj);
}

void *bpf_map__heap_address(const struct bpf_map *map)
{
	return map->heap_addr;
}

const char *libbpf_bpf_map_type_str(enum bpf_map_type type)
{
	return type == BPF_MAP_TYPE_HEAP ? "heap" : type == BPF_MAP_TYPE_ARENA ? "arena" : NULL;
}
