/* For perf_analyzer, whose sender may sleep for ever.
 *
 *     gcc -O2 -shared -fPIC -o wakeful.so wakeful.c
 *     LD_PRELOAD=$PWD/wakeful.so perf_analyzer ...
 *
 * It wakes its sender without holding the lock that the sender waits with (ResumeWorkers), so that now and then the
 * sender misses the call: no wait on a condition lasts longer than WAIT_MS here. All who wait look whether there is
 * something to do when they wake, as POSIX asks of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <time.h>

#define WAIT_MS 20

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
