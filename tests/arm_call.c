/* One call of a microkernel for tests/arm.py: file descriptor, address and size of its memory, the microkernel's number, then its
   int64 arguments, at most MOST. Compiled with -DMICROKERNELS=name,name,... and linked with the object that holds them. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { MOST = 11 };
typedef void microkernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
extern microkernel MICROKERNELS;
static microkernel *const microkernels[] = {MICROKERNELS};

int main(int argc, char **argv) {
    int64_t n[4 + MOST] = {0}, *a = n + 4;
    if (argc - 1 > 4 + MOST) return fprintf(stderr, "expected at most %d arguments, found %d\n", MOST, argc - 5), 1;
    for (int i = 1; i < argc; i++) n[i - 1] = strtoll(argv[i], NULL, 10);
    if (mmap((void *)n[1], n[2], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, n[0], 0) != (void *)n[1])
        return perror("mmap"), 1;
    microkernels[n[3]](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
    return 0;
}
