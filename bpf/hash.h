/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* The key hash, the same for programs and module: over the key's 8-byte words, the last one zero-padded. */
#ifndef KFLEX_HASH_H
#define KFLEX_HASH_H

#include "abi.h"

static inline __attribute__((always_inline)) __u64 kflex_hash_word(__u64 h, __u64 word)
{
	h = (h ^ word) * 0x9E3779B97F4A7C15ull;
	return h ^ (h >> 32);
}

static inline __attribute__((always_inline)) __u64 kflex_hash_end(__u64 h, __u32 klen)
{
	h = (h ^ klen) * 0xff51afd7ed558ccdull;
	return h ^ (h >> 33);
}

/* Cells that an entry needs; its size class is the smallest that has them. */
static inline __attribute__((always_inline)) __u32 kflex_cells(__u32 klen, __u32 vlen)
{
	return (KFLEX_ENTRY_HEAD + ((klen + 7) & ~7u) + vlen + KFLEX_CELL - 1) / KFLEX_CELL;
}

static inline __attribute__((always_inline)) __u32 kflex_class(__u32 cells)
{
	return cells <= 2    ? 0
	       : cells <= 3  ? 1
	       : cells <= 4  ? 2
	       : cells <= 6  ? 3
	       : cells <= 8  ? 4
	       : cells <= 12 ? 5
	       : cells <= 16 ? 6
	       : cells <= 24 ? 7
	       : cells <= 32 ? 8
	       : cells <= 48 ? 9
			     : 10;
}

static inline __attribute__((always_inline)) __u32 kflex_class_cells(__u32 cls)
{
	return cls == 0	  ? 2
	       : cls == 1 ? 3
	       : cls == 2 ? 4
	       : cls == 3 ? 6
	       : cls == 4 ? 8
	       : cls == 5 ? 12
	       : cls == 6 ? 16
	       : cls == 7 ? 24
	       : cls == 8 ? 32
	       : cls == 9 ? 48
			  : 69;
}

#endif
