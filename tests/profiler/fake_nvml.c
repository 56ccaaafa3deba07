/* A stand-in for libnvidia-ml.so.1: plays the GPU that FAKE_GPU names. Signatures as in nvml.h. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
typedef struct { unsigned long long total, free, used; } memory_t;

static int is(const char *name) {
    const char *gpu = getenv("FAKE_GPU");
    return gpu && !strcmp(gpu, name);
}
static int put(unsigned *out, unsigned a40, unsigned v100) {
    if (is("BARE")) return NOT_SUPPORTED;
    *out = is("ZERO") ? 0 : is("A40") ? a40 : v100;
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) { return is("NO_DRIVER") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return "fake error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)1;
    return index ? INVALID_ARGUMENT : SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)1;
    return strcmp(uuid, "GPU-0a1b") ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, is("A40") ? "NVIDIA A40" : is("BARE") || is("ZERO") ? "" : "Tesla V100-SXM2-16GB", length);
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = is("A40") ? 8 : 7;
    *minor = is("A40") ? 6 : 0;
    return is("BARE") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = is("ZERO") ? 0 : is("A40") ? 48305799168ULL : 16945512448ULL;
    return is("BARE") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    strncpy(version, is("ZERO") ? "" : "570.86.15", length);
    return is("BARE") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetPowerManagementLimit(void *device, unsigned *milliwatts) { return put(milliwatts, 300000, 250500); }
int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *megahertz) {
    return type == 1 ? put(megahertz, 1740, 1530) : type == 2 ? put(megahertz, 7251, 877) : INVALID_ARGUMENT;
}
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *generation) { return put(generation, 4, 3); }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *width) { return put(width, 16, 8); }
int nvmlDeviceGetEccMode(void *device, unsigned *current, unsigned *pending) {
    *pending = 1;
    return put(current, 1, 0);
}
#ifndef OLD_DRIVER /* drivers older than MIG lack the symbol */
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    *pending = 0;
    return is("V100") ? NOT_SUPPORTED : put(current, 0, 0);
}
#endif
