/* One call of a microkernel for tests/arm.py: file descriptor, address and size of its memory, the microkernel's number, at most 9 int64.
   Compiled with -DMICROKERNELS=name,name,... and linked with the object that holds them. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

typedef void microkernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
extern microkernel MICROKERNELS;
static microkernel *const microkernels[] = {MICROKERNELS};

int main(int argc, char **argv) {
    int64_t n[13];
    for (int i = 0; i < 13; i++) n[i] = i + 1 < argc ? strtoll(argv[i + 1], NULL, 10) : 0;
    if (mmap((void *)n[1], n[2], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, n[0], 0) != (void *)n[1])
        return perror("mmap"), 1;
    microkernels[n[3]](n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12]);
    return 0;
}
