/* SPDX-License-Identifier: MIT
 *
 * Every position a fault can have, with every instruction set: count, prefix, suffix, address.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "pykhuge.h"

enum { BEYOND = 200 }; /* bytes asked for past the start of what is bad */

/* Every position is for the core as it ships; a machine check under ASan takes a hundred times as long. */
#ifdef __SANITIZE_ADDRESS__
enum { STEP = 7 };
#else
enum { STEP = 1 };
#endif

static char source[4 * PAGE] __attribute__((aligned(4096)));
static char target[4 * PAGE] __attribute__((aligned(4096)));

/* Linked with --wrap=syscall: simulated machine checks can be reported as coarsely as the kernel does. */
enum { EXACT, PAGE_START, PAGE_END, NR_REPORTS };
static int report;
long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);

static void coarsen(siginfo_t *info)
{
	uintptr_t start = (uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1);
	info->si_addr = (void *)(report == PAGE_START ? start : start + PAGE - 1);
	info->si_addr_lsb = 12;
}

long __wrap_syscall(long number, ...)
{
	long a[4];
	va_list list;
	va_start(list, number);
	for (int i = 0; i < 4; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (report != EXACT && number == SYS_rt_tgsigqueueinfo)
		coarsen((siginfo_t *)(uintptr_t)a[3]);
	return __real_syscall(number, a[0], a[1], a[2], a[3]);
}

static void expect(int64_t result, const char *to, const char *from, size_t nr_bytes, size_t good)
{
	CHECK(result == (int64_t)(nr_bytes - good));
	CHECK(memcmp(to, from, good) == 0);
	CHECK(all_untouched(to + good, nr_bytes - good));
	CHECK(result == 0 || pykhuge_last_machine_check()->not_copied == result);
}

/* A kernel without CONFIG_MEMORY_FAILURE reports poison as BUS_ADRERR too. */
static int is_poison_code(int code)
{
	return code == BUS_MCEERR_AR || code == BUS_ADRERR;
}

static int is_truncation_code(int code)
{
	return code == BUS_ADRERR;
}

/* Every start 0..64 bytes before the bad page, every alignment of the destination. */
static void genuine_source_faults(char *memory, int (*is_code)(int))
{
	const char *bad = memory + PAGE;
	const struct pykhuge_machine_check *check = pykhuge_last_machine_check();
	for (size_t before = 0; before <= LINE; before++) {
		for (size_t align = 0; align < LINE; align += STEP) {
			size_t nr_bytes = before + BEYOND;
			memset(target, UNTOUCHED, PAGE);
			expect(pykhuge_copy_mc_bytes(target + align, bad - before, nr_bytes, NULL),
			       target + align, bad - before, nr_bytes, before);
			CHECK(is_code(check->code));
			CHECK(check->address >= (uintptr_t)bad && check->address < (uintptr_t)bad + PAGE);
		}
	}
}

/* The same towards the bad page, for every alignment of the source. */
static void genuine_destination_faults(char *memory)
{
	char *bad = memory + PAGE;
	const struct pykhuge_machine_check *check = pykhuge_last_machine_check();
	for (size_t before = 0; before <= LINE; before++) {
		for (size_t align = 0; align < LINE; align += STEP) {
			int64_t result = pykhuge_copy_mc_bytes(bad - before, source + align, before + BEYOND, NULL);
			CHECK(result == PYKHUGE_DESTINATION_FAULT);
			CHECK(check->address >= (uintptr_t)bad && check->address < (uintptr_t)bad + PAGE);
		}
	}
	fill(memory, PAGE);
}

static void simulated_source_faults(void)
{
	for (size_t from = 0; from < LINE; from++) {
		for (size_t to = 0; to < LINE; to += STEP) {
			size_t line = (from + to) % 4, nr_bytes = 4 * LINE + from % 9;
			uint64_t bad_lines = (uint64_t)1 << line | (uint64_t)1 << 63;
			memset(target, UNTOUCHED, PAGE);
			expect(pykhuge_copy_mc_bytes(target + to, source + from, nr_bytes, &bad_lines),
			       target + to, source + from, nr_bytes, line * LINE);
			CHECK(pykhuge_last_machine_check()->address == (uintptr_t)source + from + line * LINE ||
			      report != EXACT);
		}
	}
}

static void runs_of_several_pages(void)
{
	for (size_t page = 0; page < 3; page++) {
		uint64_t bad_lines[3] = {0};
		bad_lines[page] = (uint64_t)1 << 7;
		memset(target, UNTOUCHED, sizeof(target));
		expect(pykhuge_copy_mc_bytes(target, source + 5, 3 * PAGE - 3, bad_lines), target, source + 5,
		       3 * PAGE - 3, page * PAGE + 7 * LINE);
	}
}

static void bad_line_past_a_short_run(void)
{
	uint64_t bad_lines = (uint64_t)1 << 5;
	memset(target, UNTOUCHED, PAGE);
	expect(pykhuge_copy_mc_bytes(target, source, 5 * LINE, &bad_lines), target, source, 5 * LINE, 5 * LINE);
}

static void every_line_of_a_page(void)
{
	for (size_t first = 0; first < PAGE / LINE; first++) {
		for (size_t second = first; second < PAGE / LINE; second += STEP) {
			uint64_t bad_lines = (uint64_t)1 << first | (uint64_t)1 << second;
			memset(target, UNTOUCHED, PAGE);
			expect(pykhuge_copy_mc_page(target, source, bad_lines), target, source, PAGE,
			       first * LINE);
		}
	}
}

static void healthy_copies_of_any_size(void)
{
	for (size_t nr_bytes = 0; nr_bytes < 5 * LINE; nr_bytes++) {
		for (size_t align = 0; align < LINE; align += STEP) {
			memset(target, UNTOUCHED, PAGE);
			CHECK(pykhuge_copy_mc_bytes(target + align, source + LINE - align, nr_bytes, NULL) == 0);
			CHECK(memcmp(target + align, source + LINE - align, nr_bytes) == 0);
			CHECK(all_untouched(target, align));
			CHECK(all_untouched(target + align + nr_bytes, LINE));
		}
	}
}

/* 512 frames in descending order, a hole among them. */
static void frames(const char *genuine)
{
	enum { NR = 512, HOLE_AT = 100 };
	const size_t nr_bytes = (size_t)NR * PAGE;
	static uint64_t bad_lines[NR];
	static int64_t numbers[NR];
	char *base = mmap(NULL, nr_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *huge = mmap(NULL, nr_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const struct pykhuge_machine_check *check = pykhuge_last_machine_check();
	const int64_t stops[] = {0, 1, HOLE_AT - 1, HOLE_AT + 1, NR - 1, NR};

	CHECK(base != MAP_FAILED && huge != MAP_FAILED);
	fill(base, nr_bytes);
	for (int64_t i = 0; i < NR; i++)
		numbers[i] = i == HOLE_AT ? PYKHUGE_HOLE : NR - 1 - i;
	for (size_t i = 0; i < sizeof(stops) / sizeof(stops[0]); i++) {
		int64_t stop = stops[i];
		memset(bad_lines, 0, sizeof(bad_lines));
		if (stop < NR)
			bad_lines[numbers[stop]] = (uint64_t)1 << 63 | (uint64_t)1 << 2;
		memset(huge, UNTOUCHED, nr_bytes);
		CHECK(pykhuge_copy_mc_frames(huge, base, numbers, NR, bad_lines) ==
		      (stop < NR ? PAGE - 2 * LINE : 0));
		CHECK(stop == NR || check->index == stop);
		for (int64_t k = 0; k < stop; k++) {
			static const char zeros[PAGE];
			CHECK(memcmp(huge + k * PAGE, k == HOLE_AT ? zeros : base + numbers[k] * PAGE, PAGE) == 0);
		}
		if (stop < NR) {
			CHECK(memcmp(huge + stop * PAGE, base + numbers[stop] * PAGE, 2 * LINE) == 0);
			CHECK(all_untouched(huge + stop * PAGE + 2 * LINE,
					    nr_bytes - (size_t)stop * PAGE - 2 * LINE));
		}
	}
	if (genuine) { /* frame 0 is good, frame 1 is not */
		const int64_t two[] = {0, PYKHUGE_HOLE, 1};
		memset(huge, UNTOUCHED, nr_bytes);
		CHECK(pykhuge_copy_mc_frames(huge, genuine, two, 3, NULL) == PAGE);
		CHECK(check->index == 2 && all_untouched(huge + 2 * PAGE, PAGE));
	}
	munmap(base, nr_bytes);
	munmap(huge, nr_bytes);
}

static void a_destination_fault_in_the_range_form(char *memory)
{
	const int64_t two[] = {0, 1};
	CHECK(pykhuge_copy_mc_frames(memory, source, two, 2, NULL) == PYKHUGE_DESTINATION_FAULT);
	CHECK(pykhuge_last_machine_check()->index == 1);
	CHECK(pykhuge_copy_mc_page(memory + PAGE, source, 0) == PYKHUGE_DESTINATION_FAULT);
	fill(memory, PAGE);
}

int main(void)
{
	char *truncated = truncated_mapping(), *poisoned = poisoned_mapping();
	const char *name;

	if (!poisoned && getenv("PYKHUGE_REQUIRE_KERNEL")) {
		fputs("no UFFDIO_POISON here\n", stderr);
		return 1;
	}
	fill(source, sizeof(source));
	for (size_t i = 0; (name = pykhuge_instruction_set(i)); i++) {
		CHECK(pykhuge_use_instruction_set(name) == 0);
		healthy_copies_of_any_size();
		genuine_source_faults(truncated, is_truncation_code);
		genuine_destination_faults(truncated);
		a_destination_fault_in_the_range_form(truncated);
		if (poisoned) {
			genuine_source_faults(poisoned, is_poison_code);
			genuine_destination_faults(poisoned);
		}
		for (report = 0; report < NR_REPORTS; report++) {
			simulated_source_faults();
			runs_of_several_pages();
			every_line_of_a_page();
			frames(poisoned ? poisoned : truncated);
		}
		report = EXACT;
		bad_line_past_a_short_run();
		printf("%s: ok%s\n", name, poisoned ? "" : " (no UFFDIO_POISON)");
	}
	CHECK(pykhuge_use_instruction_set("none such") == -1);
	return 0;
}
