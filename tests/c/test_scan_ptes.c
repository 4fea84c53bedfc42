/* SPDX-License-Identifier: MIT
 *
 * The scan of a page table: each test of the chain at each end of it, and nothing read out of bounds,
 * whatever the words are. (What it answers is held against the reference's loop in Python.)
 */
#include <string.h>

#include "check.h"
#include "scan_ptes.h"

enum { NR_PAGES = 1024, TABLE = 1023, NR_NODES = 2, NORMAL = PYKHUGE_PG_LRU | PYKHUGE_PG_ANON };

static const int32_t distances[] = {10, 40, 40, 10};
static const int64_t node_ends[] = {600, NR_PAGES};
static uint64_t (*tables)[512];
static uint32_t *flags;
static int32_t *refcount, *mapcount, *entire_mapcount;
static struct pykhuge_pages pages;
static struct pykhuge_scan_limits limits;
static struct pykhuge_scanned scanned;
static int32_t node_load[NR_NODES];

static void *zeros(size_t size)
{
	void *at = calloc(NR_PAGES, size);
	CHECK(at);
	return at;
}

/* A full table of pages 1..512, all on the first node, young and writable. */
static void full_table(void)
{
	for (int i = 0; i < NR_PAGES; i++) {
		flags[i] = NORMAL;
		refcount[i] = mapcount[i] = 1;
		entire_mapcount[i] = 0;
	}
	for (uint64_t i = 0; i < 512; i++)
		tables[TABLE][i] = (i + 1) << 12 | PYKHUGE_PAGE_PRESENT | PYKHUGE_PAGE_RW | PYKHUGE_PAGE_ACCESSED;
	limits = (struct pykhuge_scan_limits){
		.none = 511, .swap = 64, .shared = 256, .daemon = 1, .reclaim_distance = -1};
}

static int scan(void)
{
	pykhuge_scan_ptes(&pages, TABLE, &limits, node_load, &scanned);
	return scanned.result;
}

static void full_tables_pass(void)
{
	full_table();
	CHECK(scan() == PYKHUGE_SCAN_SUCCEED);
	CHECK(scanned.page == 512 && scanned.referenced == 512 && scanned.writable);
	CHECK(scanned.none_or_zero == 0 && scanned.unmapped == 0);
	CHECK(node_load[0] == 512 && node_load[1] == 0);
}

static void one_page_fails_at(int place, uint32_t set, uint32_t clear, int32_t references, int result)
{
	full_table();
	flags[place + 1] = (flags[place + 1] | set) & ~clear;
	refcount[place + 1] += references;
	CHECK(scan() == result);
	CHECK(scanned.page == place + 1 && scanned.referenced == place);
	CHECK(node_load[0] == place + (result != PYKHUGE_SCAN_PAGE_NULL));
}

static void pages_fail_at(int place)
{
	one_page_fails_at(place, PYKHUGE_PG_ZONE_DEVICE, 0, 0, PYKHUGE_SCAN_PAGE_NULL);
	one_page_fails_at(place, 0, PYKHUGE_PG_LRU, 0, PYKHUGE_SCAN_PAGE_LRU);
	one_page_fails_at(place, PYKHUGE_PG_LOCKED, 0, 0, PYKHUGE_SCAN_PAGE_LOCK);
	one_page_fails_at(place, 0, PYKHUGE_PG_ANON, 0, PYKHUGE_SCAN_PAGE_ANON);
	one_page_fails_at(place, 0, 0, 1, PYKHUGE_SCAN_PAGE_COUNT);
	one_page_fails_at(place, PYKHUGE_PG_SWAPCACHE, 0, 0, PYKHUGE_SCAN_PAGE_COUNT);
}

static void limits_are_inclusive(void)
{
	full_table();
	memset(tables[TABLE], 0, 300 * sizeof(uint64_t));
	limits.none = 300;
	CHECK(scan() == PYKHUGE_SCAN_SUCCEED && scanned.none_or_zero == 300);
	limits.none = 299;
	CHECK(scan() == PYKHUGE_SCAN_EXCEED_NONE_PTE && scanned.none_or_zero == 300 && scanned.page == -1);
	full_table();
	for (int i = 0; i < 257; i++)
		mapcount[i + 1] = refcount[i + 1] = 2;
	CHECK(scan() == PYKHUGE_SCAN_EXCEED_SHARED_PTE && scanned.page == 257);
	limits.shared = 257;
	CHECK(scan() == PYKHUGE_SCAN_SUCCEED);
}

static void nodes_too_far_apart_abort(void)
{
	full_table();
	tables[TABLE][7] = (uint64_t)700 << 12 | PYKHUGE_PAGE_PRESENT;
	CHECK(scan() == PYKHUGE_SCAN_SUCCEED && node_load[0] == 511 && node_load[1] == 1);
	limits.reclaim_distance = 30;
	CHECK(scan() == PYKHUGE_SCAN_SCAN_ABORT && scanned.page == 700 && node_load[0] == 7);
	limits.reclaim_distance = 40;
	CHECK(scan() == PYKHUGE_SCAN_SUCCEED);
}

/* Any words at all, but for the frame numbers, which page tables vouch for. */
static void whatever_the_words_are(uint32_t rounds)
{
	uint64_t word = 88172645463325252u;
	for (uint32_t round = 0; round < rounds; round++) {
		full_table();
		for (int i = 0; i < 512; i++) {
			word ^= word << 13, word ^= word >> 7, word ^= word << 17;
			uint64_t pfn = word % (NR_PAGES - 512);
			if (word >> 60 == round % 16)
				tables[TABLE][i] = word;
			if (tables[TABLE][i] & PYKHUGE_PAGE_PRESENT)
				tables[TABLE][i] = (tables[TABLE][i] & 0xfff) | pfn << 12;
			flags[pfn] ^= (uint32_t)(word >> 20) & (PYKHUGE_PG_YOUNG | PYKHUGE_PG_REFERENCED);
		}
		limits.daemon = round & 1;
		limits.reclaim_distance = round & 2 ? 30 : -1;
		limits.swap = 512;
		int result = scan();
		CHECK(result >= PYKHUGE_SCAN_SUCCEED && result <= PYKHUGE_SCAN_PAGE_ANON);
		CHECK(node_load[0] + node_load[1] + scanned.none_or_zero + scanned.unmapped <= 512);
	}
}

int main(void)
{
	tables = zeros(sizeof(*tables));
	flags = zeros(sizeof(*flags));
	refcount = zeros(sizeof(*refcount));
	mapcount = zeros(sizeof(*mapcount));
	entire_mapcount = zeros(sizeof(*entire_mapcount));
	pages = (struct pykhuge_pages){.tables = (const uint64_t(*)[512])tables,
				       .flags = flags,
				       .refcount = refcount,
				       .mapcount = mapcount,
				       .entire_mapcount = entire_mapcount,
				       .node_ends = node_ends,
				       .distances = distances,
				       .nr_nodes = NR_NODES};
	full_tables_pass();
	for (int place = 0; place < 512; place++)
		pages_fail_at(place);
	limits_are_inclusive();
	nodes_too_far_apart_abort();
	whatever_the_words_are(2000);
	free(tables), free(flags), free(refcount), free(mapcount), free(entire_mapcount);
	return 0;
}
