/*
 * Tells of every load and store that this thread makes to watched memory (x86-64).
 *
 * Watched memory is closed to all access, so that each one faults. The handler notes
 * address and instruction, opens the memory, and lets the processor stop again after
 * this one instruction, to close it. An instruction that repeats ("rep movsb") stops
 * after each round, and is noted as often.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define TRAP_FLAG 0x100 /* of the processor's flags: stop after one instruction */
#define WRITE 2         /* of a page fault's error code */
#define REGIONS 16
#define ROOM 65536

struct access { uint64_t address, instruction, write; };

static struct { uint8_t *start; size_t size; } region[REGIONS];
static int regions;
static struct access noted[ROOM];
static int count;
static uint8_t *shots, *shots_end; /* room for copies of all regions; NULL: none */
static struct sigaction on_fault_before, on_trap_before;

static void protect(int protection)
{
    for (int i = 0; i < regions; i++)
        if (mprotect(region[i].start, region[i].size, protection) != 0)
            abort();
}

static int is_watched(const uint8_t *address)
{
    for (int i = 0; i < regions; i++)
        if (address >= region[i].start
            && address < region[i].start + region[i].size)
            return 1;
    return 0;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

    (void)number;
    if (!is_watched(info->si_addr) || count == ROOM) {
        /* Not ours: it happens again, and is treated as it would have been. */
        sigaction(SIGSEGV, &on_fault_before, NULL);
        return;
    }
    noted[count].address = (uint64_t)info->si_addr;
    noted[count].instruction = (uint64_t)registers[REG_RIP];
    noted[count].write = (registers[REG_ERR] & WRITE) != 0;
    count++;
    protect(PROT_READ | PROT_WRITE);
    registers[REG_EFL] |= TRAP_FLAG;
}

/* Keep a copy of all watched memory as it is after the last access. */
static void take_shot(void)
{
    for (int i = 0; i < regions; i++) {
        if (shots + region[i].size > shots_end)
            abort();
        memcpy(shots, region[i].start, region[i].size);
        shots += region[i].size;
    }
}

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)info;
    if (shots && noted[count - 1].write)
        take_shot();
    protect(PROT_NONE);
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
}

/* To be called before watch(), for each piece: whole pages. */
int add_region(uint8_t *start, size_t size)
{
    if (regions == REGIONS)
        return -1;
    region[regions].start = start;
    region[regions++].size = size;
    return 0;
}

/* To be called before watch(): after each store, all of the memory is copied there. */
void set_shots(uint8_t *start, size_t size)
{
    shots = start;
    shots_end = start + size;
}

void watch(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO};

    count = 0;
    action.sa_sigaction = on_fault;
    sigaction(SIGSEGV, &action, &on_fault_before);
    action.sa_sigaction = on_trap;
    sigaction(SIGTRAP, &action, &on_trap_before);
    protect(PROT_NONE);
}

/* Ends the watch; the number of accesses. */
int unwatch(struct access **accesses)
{
    protect(PROT_READ | PROT_WRITE);
    sigaction(SIGSEGV, &on_fault_before, NULL);
    sigaction(SIGTRAP, &on_trap_before, NULL);
    regions = 0;
    shots = NULL;
    *accesses = noted;
    return count;
}

/* For the test of the test: code that does what nobody should. */

int fetch_once(const volatile uint16_t *word, uint16_t limit)
{
    uint16_t value = *word;

    return value < limit ? value : -1;
}

int fetch_twice(const volatile uint16_t *word, uint16_t limit)
{
    return *word < limit ? *word : -1;
}

int fetch_in_halves(const volatile uint8_t *word)
{
    return word[0] | word[1] << 8;
}
