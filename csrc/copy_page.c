/* SPDX-License-Identifier: MIT */
#include "copy_page.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "pykhuge.h"

enum { LINE = PYKHUGE_LINE_SIZE };

/* Nothing the compiler knows of may cross: between counting a line and touching the next, a fault may
 * end this function at any instruction. */
static inline void line_done(volatile size_t *copied, size_t nr_bytes)
{
	atomic_signal_fence(memory_order_seq_cst);
	*copied = nr_bytes;
	atomic_signal_fence(memory_order_seq_cst);
}

/* Into the second-level cache: it waits for more lines at a time than the first, and a copy of cold pages
 * * is nothing but waiting. Four at once are a tenth faster than one at a time. */
enum { NR_PREFETCH = 4 };

static inline void prefetch_lines(const char *next)
{
	for (int i = 0; i < NR_PREFETCH; i++)
		__builtin_prefetch(next + i * LINE, 0, 2);
}

/* The loops are the same for all; only how one line moves differs. */
#define DEFINE_COPY_LINES(name, attributes, copy_line)                                               \
	attributes static void name(char *to, const char *from, size_t nr_lines,                     \
				    volatile size_t *copied)                                         \
	{                                                                                            \
		size_t done = *copied;                                                               \
		for (size_t i = 0; i < nr_lines; i++) {                                              \
			copy_line(to + i * LINE, from + i * LINE);                                   \
			line_done(copied, done += LINE);                                             \
		}                                                                                    \
	}
#define DEFINE_STREAM_LINES(name, attributes, stream_line)                                           \
	attributes static void name(char *to, const char *from, size_t nr_lines, const char *next,   \
				    volatile size_t *copied)                                         \
	{                                                                                            \
		size_t done = *copied;                                                               \
		for (size_t i = 0; i < nr_lines; i++) {                                              \
			if (i % NR_PREFETCH == 0)                                                    \
				prefetch_lines(next + i * LINE);                                     \
			stream_line(to + i * LINE, from + i * LINE);                                 \
			line_done(copied, done += LINE);                                             \
		}                                                                                    \
	}

static inline void portable_line(char *to, const char *from)
{
	memcpy(to, from, LINE);
}
DEFINE_COPY_LINES(portable_cached, , portable_line)
DEFINE_STREAM_LINES(portable_streamed, , portable_line)

#ifdef __x86_64__
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))

AVX2 static inline void avx2_line(char *to, const char *from)
{
	__m256i low = _mm256_loadu_si256((const __m256i *)from);
	__m256i high = _mm256_loadu_si256((const __m256i *)(from + 32));
	_mm256_storeu_si256((__m256i *)to, low);
	_mm256_storeu_si256((__m256i *)(to + 32), high);
}
AVX2 static inline void avx2_stream_line(char *to, const char *from)
{
	__m256i low = _mm256_loadu_si256((const __m256i *)from);
	__m256i high = _mm256_loadu_si256((const __m256i *)(from + 32));
	_mm256_stream_si256((__m256i *)to, low);
	_mm256_stream_si256((__m256i *)(to + 32), high);
}
DEFINE_COPY_LINES(avx2_cached, AVX2, avx2_line)
DEFINE_STREAM_LINES(avx2_streamed, AVX2, avx2_stream_line)

AVX512 static inline void avx512_line(char *to, const char *from)
{
	_mm512_storeu_si512(to, _mm512_loadu_si512(from));
}
AVX512 static inline void avx512_stream_line(char *to, const char *from)
{
	_mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}
DEFINE_COPY_LINES(avx512_cached, AVX512, avx512_line)
DEFINE_STREAM_LINES(avx512_streamed, AVX512, avx512_stream_line)
#endif

static const struct copy_lines sets[] = {
#ifdef __x86_64__
	{"avx512", avx512_cached, avx512_streamed},
	{"avx2", avx2_cached, avx2_streamed},
#endif
	{"portable", portable_cached, portable_streamed},
};
enum { NR_SETS = sizeof(sets) / sizeof(sets[0]) };

static int supported(const struct copy_lines *set)
{
#ifdef __x86_64__
	__builtin_cpu_init();
	if (strcmp(set->name, "avx512") == 0)
		return __builtin_cpu_supports("avx512f") != 0;
	if (strcmp(set->name, "avx2") == 0)
		return __builtin_cpu_supports("avx2") != 0;
#endif
	return set == &sets[NR_SETS - 1];
}

/* NULL until the first copy: then the best this processor has. */
static const struct copy_lines *_Atomic current;

const struct copy_lines *copy_lines(void)
{
	const struct copy_lines *set = atomic_load_explicit(&current, memory_order_relaxed);
	if (__builtin_expect(set != NULL, 1))
		return set;
	for (set = sets; !supported(set);)
		set++;
	atomic_store_explicit(&current, set, memory_order_relaxed);
	return set;
}

void copy_lines_fence(void)
{
#ifdef __x86_64__
	_mm_sfence();
#endif
}

const char *pykhuge_instruction_set(size_t i)
{
	for (const struct copy_lines *set = sets; set < sets + NR_SETS; set++)
		if (supported(set) && i-- == 0)
			return set->name;
	return NULL;
}

const char *pykhuge_current_instruction_set(void)
{
	return copy_lines()->name;
}

int pykhuge_use_instruction_set(const char *name)
{
	for (const struct copy_lines *set = sets; set < sets + NR_SETS; set++) {
		if (supported(set) && strcmp(set->name, name) == 0) {
			atomic_store_explicit(&current, set, memory_order_relaxed);
			return 0;
		}
	}
	return -1;
}
