/* SPDX-License-Identifier: MIT
 *
 * What scan_ptes.h promises. One function a kind of entry; each returns SCAN_SUCCEED to go on.
 */
#include "scan_ptes.h"

#include <string.h>

enum { GO_ON = PYKHUGE_SCAN_SUCCEED, PFN_SHIFT = 12, SWP_TYPE_SHIFT = 59, SWP_OFFSET_SHIFT = 9 };

static const uint64_t PFN_BITS = (((uint64_t)1 << 52) - 1) >> PFN_SHIFT;
static const uint64_t SWP_OFFSET_BITS = ((uint64_t)1 << (SWP_TYPE_SHIFT - SWP_OFFSET_SHIFT)) - 1;

struct scan {
	const struct pykhuge_pages *pages;
	const struct pykhuge_scan_limits *limits;
	int32_t *node_load;
	struct pykhuge_scanned *found;
	int shared;
	/* The compound page met last, and how often all its parts are mapped: the sum over 512 is not done
	 * again for each of its entries. */
	int64_t summed_head;
	int32_t summed;
};

static int swap_entry_is_uffd_wp(uint64_t pte)
{
	/* Offsets are stored inverted. */
	uint64_t offset = ~(pte >> SWP_OFFSET_SHIFT) & SWP_OFFSET_BITS;
	if (pte >> SWP_TYPE_SHIFT == PYKHUGE_SWP_PTE_MARKER && offset & PYKHUGE_PTE_MARKER_UFFD_WP)
		return 1;
	return (pte & PYKHUGE_SWP_UFFD_WP) != 0;
}

static int scan_swap_entry(struct scan *scan, uint64_t pte)
{
	if (++scan->found->unmapped > scan->limits->swap)
		return PYKHUGE_SCAN_EXCEED_SWAP_PTE;
	return swap_entry_is_uffd_wp(pte) ? PYKHUGE_SCAN_PTE_UFFD_WP : GO_ON;
}

static int scan_none_or_zero(struct scan *scan)
{
	return ++scan->found->none_or_zero > scan->limits->none ? PYKHUGE_SCAN_EXCEED_NONE_PTE : GO_ON;
}

static int32_t total_mapcount(struct scan *scan, int64_t head)
{
	const struct pykhuge_pages *pages = scan->pages;
	if (!(pages->flags[head] & PYKHUGE_PG_HEAD))
		return pages->mapcount[head];
	if (scan->summed_head != head) {
		scan->summed_head = head;
		scan->summed = pages->entire_mapcount[head];
		for (int64_t i = 0; i < PYKHUGE_PTES; i++)
			scan->summed += pages->mapcount[head + i];
	}
	return scan->summed;
}

static int only_mapped_and_cached(struct scan *scan, int64_t head)
{
	uint32_t flags = scan->pages->flags[head];
	int32_t expected = total_mapcount(scan, head);
	if (flags & PYKHUGE_PG_SWAPCACHE)
		expected += flags & PYKHUGE_PG_HEAD ? PYKHUGE_PTES : 1;
	return scan->pages->refcount[head] == expected;
}

static int node_of(const struct pykhuge_pages *pages, int64_t pfn)
{
	int nid = 0;
	while (nid < pages->nr_nodes - 1 && pfn >= pages->node_ends[nid])
		nid++;
	return nid;
}

/* Whether node @nid is met for the first time, and too far from one met before. */
static int too_far(const struct scan *scan, int nid)
{
	const struct pykhuge_pages *pages = scan->pages;
	if (scan->limits->reclaim_distance < 0 || scan->node_load[nid])
		return 0;
	for (int other = 0; other < pages->nr_nodes; other++)
		if (scan->node_load[other] &&
		    pages->distances[nid * pages->nr_nodes + other] > scan->limits->reclaim_distance)
			return 1;
	return 0;
}

static int is_shared(const struct scan *scan, int64_t pfn, int64_t head, int compound)
{
	const struct pykhuge_pages *pages = scan->pages;
	if (compound && scan->limits->folios)
		return (pages->flags[head] & PYKHUGE_PG_MAPPED_SHARED) != 0;
	return pages->mapcount[pfn] + (compound ? pages->entire_mapcount[head] : 0) > 1;
}

static int scan_page(struct scan *scan, int64_t pfn, uint64_t pte)
{
	const struct pykhuge_pages *pages = scan->pages;
	struct pykhuge_scanned *found = scan->found;
	uint32_t own = pages->flags[pfn];
	int64_t head = own & PYKHUGE_PG_TAIL ? pfn & -PYKHUGE_PTES : pfn;
	uint32_t flags = pages->flags[head];
	int compound = (own & (PYKHUGE_PG_HEAD | PYKHUGE_PG_TAIL)) != 0;

	if (!scan->limits->folios)
		found->page = pfn;
	if (flags & PYKHUGE_PG_ZONE_DEVICE)
		return PYKHUGE_SCAN_PAGE_NULL;
	if (scan->limits->folios)
		found->page = head;
	if (is_shared(scan, pfn, head, compound) && ++scan->shared > scan->limits->shared)
		return PYKHUGE_SCAN_EXCEED_SHARED_PTE;

	found->page = head;
	int nid = node_of(pages, head);
	if (too_far(scan, nid))
		return PYKHUGE_SCAN_SCAN_ABORT;
	scan->node_load[nid]++;
	if (!(flags & PYKHUGE_PG_LRU))
		return PYKHUGE_SCAN_PAGE_LRU;
	if (flags & PYKHUGE_PG_LOCKED)
		return PYKHUGE_SCAN_PAGE_LOCK;
	if (!(flags & PYKHUGE_PG_ANON))
		return PYKHUGE_SCAN_PAGE_ANON;
	if (!only_mapped_and_cached(scan, head))
		return PYKHUGE_SCAN_PAGE_COUNT;
	if (scan->limits->daemon && (pte & PYKHUGE_PAGE_ACCESSED || scan->limits->notified ||
				     flags & (PYKHUGE_PG_REFERENCED | PYKHUGE_PG_YOUNG)))
		found->referenced++;
	return GO_ON;
}

static int scan_entry(struct scan *scan, uint64_t pte)
{
	int64_t pfn = (int64_t)(pte >> PFN_SHIFT & PFN_BITS);
	if (pte && !(pte & PYKHUGE_PAGE_PRESENT))
		return scan_swap_entry(scan, pte);
	if (!pte || pfn == scan->pages->zero_pfn)
		return scan_none_or_zero(scan);
	if (pte & PYKHUGE_PAGE_UFFD_WP)
		return PYKHUGE_SCAN_PTE_UFFD_WP;
	if (pte & PYKHUGE_PAGE_RW)
		scan->found->writable = 1;
	return scan_page(scan, pfn, pte);
}

static int worth_it(const struct scan *scan)
{
	const struct pykhuge_scanned *found = scan->found;
	if (!found->writable && !scan->limits->read_only)
		return PYKHUGE_SCAN_PAGE_RO;
	if (scan->limits->daemon &&
	    (!found->referenced || (found->unmapped && found->referenced < PYKHUGE_PTES / 2)))
		return PYKHUGE_SCAN_LACK_REFERENCED_PAGE;
	return PYKHUGE_SCAN_SUCCEED;
}

void pykhuge_scan_ptes(const struct pykhuge_pages *pages, int64_t table,
		       const struct pykhuge_scan_limits *limits, int32_t *node_load,
		       struct pykhuge_scanned *scanned)
{
	struct scan scan = {
		.pages = pages, .limits = limits, .node_load = node_load, .found = scanned, .summed_head = -1};
	const uint64_t *ptes = pages->tables[table];

	*scanned = (struct pykhuge_scanned){.result = GO_ON, .page = -1};
	memset(node_load, 0, (size_t)pages->nr_nodes * sizeof(*node_load));
	for (int i = 0; i < PYKHUGE_PTES && scanned->result == GO_ON; i++)
		scanned->result = scan_entry(&scan, ptes[i]);
	if (scanned->result == GO_ON)
		scanned->result = worth_it(&scan);
}
