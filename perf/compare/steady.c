/* For perf_analyzer, in two things in which it disturbs what it measures:
 *
 *     gcc -O2 -shared -fPIC -o steady.so steady.c
 *     LD_PRELOAD=$PWD/steady.so STEADY_FILES=/dev/shm/steady- STEADY_MB=1024 perf_analyzer ...
 *
 * It keeps the inputs of all its requests and is gone after each run. On a virtual machine that takes and gives
 * memory, it and all others wait for its fresh pages (decision 0123), so with STEADY_FILES blocks of 64 KiB and
 * more come from a file in memory that stays, STEADY_MB of it: the first of the numbered ones that no other process
 * has. steady.py builds this, and removes the files.
 *
 * It wakes its sender without holding the lock that the sender waits with, so that now and then the sender
 * misses the call and sends nothing for ever: no wait on a condition lasts longer than WAIT_MS here. All who wait
 * look whether there is something to do when they wake, as POSIX asks of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 20
#define FILES 64
#define LEAST ((size_t)64 << 10)
#define MOST ((size_t)16 << 20)
#define STEP ((size_t)16 << 10)
#define AHEAD ((size_t)16 << 20)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define HEAD ((size_t)64) /* before a block: its class; keeps blocks aligned as cache lines are */

extern void *__libc_malloc(size_t);
extern void __libc_free(void *);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

struct block {
    struct block *next;
};

static char *begin, *next, *end;
static struct block *unused[(MOST + HEAD) / STEP + 2];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WAIT_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    int result = pthread_cond_clockwait(condition, mutex, CLOCK_MONOTONIC, &until);
    return result == ETIMEDOUT ? 0 : result;
}

/* Map what the requests will take before they do. All of it at once would keep the program from its start. */
static void *map_ahead(void *unused_argument) {
    (void)unused_argument;
    for (char *part = begin; part < end; part += AHEAD)
        madvise(part, (size_t)(end - part) < AHEAD ? (size_t)(end - part) : AHEAD, MADV_POPULATE_WRITE);
    return NULL;
}

__attribute__((constructor)) static void open_file(void) {
    const char *files = getenv("STEADY_FILES"), *text = getenv("STEADY_MB");
    size_t wanted = (size_t)(text ? atol(text) : 0) << 20;
    char path[256];

    for (int number = 0; files && wanted && number < FILES; number++) {
        snprintf(path, sizeof path, "%s%d", files, number);
        int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (file < 0)
            return;
        if (flock(file, LOCK_EX | LOCK_NB)) { /* ours until we end: the file stays open */
            close(file);
            continue;
        }
        if (ftruncate(file, (off_t)wanted))
            return;
        char *found = mmap(NULL, wanted, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        pthread_t thread;
        if (found != MAP_FAILED) {
            end = found + wanted;
            next = found;
            begin = found;
            if (!pthread_create(&thread, NULL, map_ahead, NULL))
                pthread_detach(thread);
        }
        return;
    }
}

static void *take(size_t size) {
    size_t class = (size + HEAD + STEP - 1) / STEP;
    char *found = NULL;

    pthread_mutex_lock(&lock);
    if (unused[class]) {
        found = (char *)unused[class];
        unused[class] = unused[class]->next;
    } else if ((size_t)(end - next) >= class * STEP) {
        found = next + HEAD;
        *(size_t *)(found - HEAD) = class;
        next += class * STEP;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static int is_ours(const void *block) { return begin && (const char *)block >= begin && (const char *)block < end; }

static size_t *class_of(void *block) { return (size_t *)((char *)block - HEAD); }

void *malloc(size_t size) {
    void *found = begin && size >= LEAST && size <= MOST ? take(size) : NULL;
    return found ? found : __libc_malloc(size);
}

void free(void *block) {
    if (!is_ours(block)) {
        __libc_free(block);
        return;
    }
    pthread_mutex_lock(&lock);
    ((struct block *)block)->next = unused[*class_of(block)];
    unused[*class_of(block)] = block;
    pthread_mutex_unlock(&lock);
}

void *calloc(size_t count, size_t size) {
    size_t bytes;

    if (!__builtin_mul_overflow(count, size, &bytes) && begin && bytes >= LEAST && bytes <= MOST) {
        void *found = take(bytes);
        if (found)
            return memset(found, 0, bytes);
    }
    return __libc_calloc(count, size);
}

void *realloc(void *block, size_t size) {
    if (!is_ours(block))
        return __libc_realloc(block, size);
    size_t room = *class_of(block) * STEP - HEAD;
    if (size <= room && size > 0)
        return block;
    void *found = size ? malloc(size) : NULL;
    if (found)
        memcpy(found, block, room);
    if (found || !size)
        free(block);
    return found;
}
