/* SPDX-License-Identifier: MIT
 *
 * The daemon's look at one page table: 512 entries and the struct pages behind them, in the order of the
 * kernel's tests, up to the first that fails. Nothing is changed but the record.
 *
 * The model's state is arrays that Python made and owns; here are pointers to them and the bits they are
 * read by, which mm/page and mm/page_table define (a test holds the two against each other).
 *
 * The lines between the two cdef marks are also the declarations that cffi compiles.
 */
#ifndef PYKHUGE_SCAN_PTES_H
#define PYKHUGE_SCAN_PTES_H

#include <stdint.h>

/* cdef: begin */
enum {
	PYKHUGE_PTES = 512,
	PYKHUGE_PAGE_PRESENT = 0x1,
	PYKHUGE_PAGE_RW = 0x2,
	PYKHUGE_PAGE_ACCESSED = 0x20,
	PYKHUGE_PAGE_UFFD_WP = 0x400,
	PYKHUGE_SWP_UFFD_WP = 0x4,
	PYKHUGE_SWP_PTE_MARKER = 31,
	PYKHUGE_PTE_MARKER_UFFD_WP = 0x1,
	PYKHUGE_PG_LOCKED = 0x1,
	PYKHUGE_PG_REFERENCED = 0x2,
	PYKHUGE_PG_LRU = 0x10,
	PYKHUGE_PG_SWAPCACHE = 0x100,
	PYKHUGE_PG_HEAD = 0x800,
	PYKHUGE_PG_TAIL = 0x1000,
	PYKHUGE_PG_YOUNG = 0x4000,
	PYKHUGE_PG_ANON = 0x10000,
	PYKHUGE_PG_ZONE_DEVICE = 0x40000,
	PYKHUGE_PG_MAPPED_SHARED = 0x20000000,
};

/* enum scan_result, as far as this scan gives it. */
enum pykhuge_scan_result {
	PYKHUGE_SCAN_SUCCEED = 1,
	PYKHUGE_SCAN_EXCEED_NONE_PTE = 5,
	PYKHUGE_SCAN_EXCEED_SWAP_PTE = 6,
	PYKHUGE_SCAN_EXCEED_SHARED_PTE = 7,
	PYKHUGE_SCAN_PTE_UFFD_WP = 9,
	PYKHUGE_SCAN_PAGE_RO = 11,
	PYKHUGE_SCAN_LACK_REFERENCED_PAGE = 12,
	PYKHUGE_SCAN_PAGE_NULL = 13,
	PYKHUGE_SCAN_SCAN_ABORT = 14,
	PYKHUGE_SCAN_PAGE_COUNT = 15,
	PYKHUGE_SCAN_PAGE_LRU = 16,
	PYKHUGE_SCAN_PAGE_LOCK = 17,
	PYKHUGE_SCAN_PAGE_ANON = 18,
};

/* The machine: page tables by frame number, struct page by field. A node's frames end before
 * node_ends[nid], the last node has all others; distances is nr_nodes x nr_nodes. */
struct pykhuge_pages {
	const uint64_t (*tables)[512];
	const uint32_t *flags;
	const int32_t *refcount;
	const int32_t *mapcount;
	const int32_t *entire_mapcount;
	int64_t zero_pfn;
	const int64_t *node_ends;
	const int32_t *distances;
	int nr_nodes;
};

/* How many entries of a kind may pass. daemon: "young" is asked for; notified: a secondary MMU says so of
 * every entry. reclaim_distance: farther nodes are not put together; negative: whatever the distance.
 * folios: a compound page is shared as a whole, as PG_MAPPED_SHARED of its head says, and it is the head
 * that is told. read_only: a table without a writable entry is worth it too. */
struct pykhuge_scan_limits {
	int none;
	int swap;
	int shared;
	int daemon;
	int notified;
	int reclaim_distance;
	int folios;
	int read_only;
};

/* The fields of the trace event. page is a frame number, -1 for none. */
struct pykhuge_scanned {
	int result;
	int writable;
	int referenced;
	int none_or_zero;
	int unmapped;
	int64_t page;
};

/* Scan the table in frame @table. @node_load gets, by node, the pages that were counted before the end. */
void pykhuge_scan_ptes(const struct pykhuge_pages *pages, int64_t table,
		       const struct pykhuge_scan_limits *limits, int32_t *node_load,
		       struct pykhuge_scanned *scanned);
/* cdef: end */

#endif
