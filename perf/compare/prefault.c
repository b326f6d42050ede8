/* For perf_analyzer, which keeps the inputs of all its requests: memory for them, touched before the load.
 *
 *     gcc -O2 -shared -fPIC -o prefault.so prefault.c
 *     LD_PRELOAD=$PWD/prefault.so PREFAULT_MB=512 perf_analyzer ...
 *
 * On a virtual machine where fresh pages come slowly, its sender and receiver else wait for them (decision 0121).
 */
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK ((size_t)512 << 20)
#define MOST 64

__attribute__((constructor)) static void prefault(void) {
    const char *text = getenv("PREFAULT_MB");
    size_t wanted = (size_t)(text ? atol(text) : 0) << 20;
    char *parts[MOST];
    int count = 0;

    if (!wanted)
        return;
    mallopt(M_ARENA_MAX, 1); /* what is given back here is what the threads get */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 2147483647);
    for (size_t done = 0; done < wanted && count < MOST; done += CHUNK) {
        char *part = malloc(CHUNK);
        if (part)
            memset(part, 1, CHUNK);
        parts[count++] = part;
    }
    while (count)
        free(parts[--count]);
}
