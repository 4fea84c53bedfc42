/* SPDX-License-Identifier: MIT
 *
 * The copies of pykhuge.h: where each range goes, when it stops, and what is reported.
 */
#include "pykhuge.h"

#include <string.h>

#include "copy_page.h"
#include "machine_check.h"

enum { PAGE = PYKHUGE_PAGE_SIZE, LINE = PYKHUGE_LINE_SIZE, LINES_PER_PAGE = PAGE / LINE };

/* A hole is a copy of this, as the zero page is what a hole reads as. */
static const char zero_page[PAGE] __attribute__((aligned(PYKHUGE_PAGE_SIZE)));

static __thread __attribute__((tls_model("initial-exec"))) struct pykhuge_machine_check last;

const struct pykhuge_machine_check *pykhuge_last_machine_check(void)
{
	return &last;
}

static int64_t report(struct recovery *here, int64_t index)
{
	copy_lines_fence();
	recovery_land(here);
	last.index = index;
	last.not_copied = (int64_t)(here->nr_bytes - here->copied);
	last.address = here->address;
	last.code = here->code;
	last.address_lsb = here->address_lsb;
	return here->fault == DESTINATION_FAULT ? PYKHUGE_DESTINATION_FAULT : last.not_copied;
}

static size_t first_bad_line(uint64_t bad_lines)
{
	return bad_lines ? (size_t)__builtin_ctzll(bad_lines) : LINES_PER_PAGE;
}

static void machine_check_if(struct recovery *here, const char *page, uint64_t bad_lines)
{
	if (bad_lines)
		machine_check_raise(here, page + first_bad_line(bad_lines) * LINE);
}

int64_t pykhuge_copy_mc_page(void *to, const void *from, uint64_t bad_lines)
{
	struct recovery here;
	machine_check_watch();
	if (sigsetjmp(here.env, 0))
		return report(&here, 0);
	recovery_enter(&here);
	recovery_range(&here, to, from, PAGE);
	copy_lines()->cached(to, from, first_bad_line(bad_lines), &here.copied);
	machine_check_if(&here, from, bad_lines);
	recovery_leave(&here);
	return 0;
}

static const char *frame_at(const char *base, int64_t frame)
{
	return frame < 0 ? zero_page : base + frame * PAGE;
}

/* What is copied after frame @i of @nr; the last is followed by itself. */
static const char *frame_after(const char *base, const int64_t *frames, size_t nr, size_t i)
{
	return frame_at(base, frames[i + 1 < nr ? i + 1 : i]);
}

/* A fresh huge page is in no cache: streaming spares reading what is overwritten. */
int64_t pykhuge_copy_mc_frames(void *to, const void *base, const int64_t *frames, size_t nr,
			       const uint64_t *bad_lines)
{
	stream_lines_fn *const copy = copy_lines()->streamed;
	struct recovery here;
	volatile size_t index = 0; /* read after the jump */

	machine_check_watch();
	if (sigsetjmp(here.env, 0))
		return report(&here, (int64_t)index);
	recovery_enter(&here);
	for (size_t i = 0; i < nr; i++) {
		uint64_t bad = bad_lines && frames[i] >= 0 ? bad_lines[frames[i]] : 0;
		const char *from = frame_at(base, frames[i]);
		char *page = (char *)to + i * PAGE;
		index = i;
		recovery_range(&here, page, from, PAGE);
		copy(page, from, first_bad_line(bad), frame_after(base, frames, nr, i), &here.copied);
		machine_check_if(&here, from, bad);
	}
	recovery_leave(&here);
	copy_lines_fence();
	return 0;
}

/* Bytes of @bad_lines' range that come before its first bad line; @nr_bytes if there is none. */
static size_t good_bytes(const uint64_t *bad_lines, size_t nr_bytes)
{
	size_t nr_words = bad_lines ? (nr_bytes + PAGE - 1) / PAGE : 0;
	for (size_t page = 0; page < nr_words; page++) {
		size_t good = page * PAGE + first_bad_line(bad_lines[page]) * LINE;
		if (bad_lines[page])
			return good < nr_bytes ? good : nr_bytes;
	}
	return nr_bytes;
}

/* Less than a line at either end; they lie in one line of the source, so the first load fails or none. */
static void copy_some(struct recovery *here, char *to, const char *from, size_t nr_bytes)
{
	memcpy(to, from, nr_bytes);
	here->copied += nr_bytes;
}

/* Any run of bytes inside a recovery point. */
static void copy_bytes_until(struct recovery *here, char *to, const char *from, size_t nr_bytes,
			     const uint64_t *bad_lines)
{
	size_t good = good_bytes(bad_lines, nr_bytes);
	size_t to_line = -(uintptr_t)from % LINE;
	size_t head = to_line < good ? to_line : good;
	size_t nr_lines = (good - head) / LINE;
	size_t tail = head + nr_lines * LINE;

	recovery_range(here, to, from, nr_bytes);
	copy_some(here, to, from, head);
	copy_lines()->cached(to + head, from + head, nr_lines, &here->copied);
	copy_some(here, to + tail, from + tail, good - tail);
	if (good < nr_bytes)
		machine_check_raise(here, from + good);
}

int64_t pykhuge_copy_mc_bytes(void *to, const void *from, size_t nr_bytes, const uint64_t *bad_lines)
{
	struct recovery here;
	machine_check_watch();
	if (sigsetjmp(here.env, 0))
		return report(&here, 0);
	recovery_enter(&here);
	copy_bytes_until(&here, to, from, nr_bytes, bad_lines);
	recovery_leave(&here);
	return 0;
}

/* ---- without recovery ---- */

void pykhuge_copy_page(void *to, const void *from)
{
	volatile size_t copied = 0;
	copy_lines()->cached(to, from, LINES_PER_PAGE, &copied);
}

void pykhuge_copy_frames(void *to, const void *base, const int64_t *frames, size_t nr)
{
	stream_lines_fn *copy = copy_lines()->streamed;
	for (size_t i = 0; i < nr; i++) {
		volatile size_t copied = 0;
		copy((char *)to + i * PAGE, frame_at(base, frames[i]), LINES_PER_PAGE,
		     frame_after(base, frames, nr, i), &copied);
	}
	copy_lines_fence();
}

void pykhuge_baseline_memcpy_frames(void *to, const void *base, const int64_t *frames, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		memcpy((char *)to + i * PAGE, frame_at(base, frames[i]), PAGE);
}
