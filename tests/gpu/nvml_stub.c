/* A libnvidia-ml.so.1 that says what a control file tells it to, for tests. See driver.py for the file.
 *
 * The file is named by NVML_STUB and read anew at each call: lines of `key=value`. Only what this project calls is
 * here; what an old driver lacks is left out with -DOLD_DRIVER. Layouts are those of NVIDIA's public nvml.h. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       ARGUMENT_VERSION_MISMATCH = 25 };

typedef struct { int index; int instance; } device; /* instance -1: the whole card */
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; int sensor, temperature; } temperature_v1;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;

static int started = 0;
static device devices[16][8];

static int lookup(const char *key, char *value, size_t size) {
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    int found = 0;
    size_t length = strlen(key);
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, key, length) && line[length] == '=') {
            snprintf(value, size, "%s", line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static long long number(const char *key, long long otherwise) {
    char value[64];
    return lookup(key, value, sizeof value) ? strtoll(value, NULL, 10) : otherwise;
}

/* A driver that hangs does so until the file says otherwise. */
static void hang(void) {
    struct timespec rest = {0, 5000000};
    while (number("hang", 0)) nanosleep(&rest, NULL);
}

/* `calls=FILE` gets the name of each call. */
static void note(const char *name) {
    char path[512];
    FILE *file;
    if (lookup("calls", path, sizeof path) && (file = fopen(path, "a"))) {
        fprintf(file, "%s\n", name);
        fclose(file);
    }
}

static int ready(const char *name) {
    note(name);
    hang();
    if (!started) return UNINITIALIZED;
    return (int)number("driver", SUCCESS);
}

/* `<card>.<field>` or `<card>.<instance>.<field>`; a field of `!3` is the error 3, an absent one NOT_SUPPORTED. */
static int field(device *which, const char *name, char *value, size_t size) {
    char key[64];
    int error = ready(name);
    if (error) return error;
    if (which->instance < 0) snprintf(key, sizeof key, "%d.%s", which->index, name);
    else snprintf(key, sizeof key, "%d.%d.%s", which->index, which->instance, name);
    if (!lookup(key, value, size)) return NOT_SUPPORTED;
    return value[0] == '!' ? atoi(value + 1) : SUCCESS;
}

static int field_number(device *which, const char *name, long long *value) {
    char text[64];
    int error = field(which, name, text, sizeof text);
    if (!error) *value = strtoll(text, NULL, 10);
    return error;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    note("init");
    hang();
    int error = (int)number("driver", SUCCESS);
    if (!error) started++;
    return error;
}

int nvmlShutdown(void) {
    note("shutdown");
    if (!started) return UNINITIALIZED;
    started--;
    return SUCCESS;
}

const char *nvmlErrorString(int error) {
    static char text[32];
    snprintf(text, sizeof text, "stub error %d", error);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    int error = ready("count");
    *count = (unsigned)number("count", 0);
    return error;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle) {
    char text[64];
    device whole = {(int)index, -1};
    devices[index][7] = whole;
    *handle = &devices[index][7];
    int error = field(*handle, "handle", text, sizeof text);
    return error == NOT_SUPPORTED ? SUCCESS : error;
}

int nvmlDeviceGetName(device *which, char *name, unsigned size) { return field(which, "name", name, size); }

int nvmlDeviceGetUUID(device *which, char *uuid, unsigned size) { return field(which, "uuid", uuid, size); }

int nvmlDeviceGetUtilizationRates(device *which, utilization *rates) {
    long long value = 0;
    int error = field_number(which, "utilization", &value);
    rates->gpu = (unsigned)value;
    return error;
}

/* `memory` is used and total, `memory.reserved` what the driver keeps for itself. */
static int memory(device *which, unsigned long long *total, unsigned long long *reserved, unsigned long long *used) {
    char text[64];
    long long kept = 0;
    int error = field(which, "memory", text, sizeof text);
    if (error) return error;
    sscanf(text, "%llu %llu", used, total);
    field_number(which, "memory.reserved", &kept);
    *reserved = (unsigned long long)kept;
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(device *which, memory_v2 *info) {
    if (info->version != (sizeof *info | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    int error = memory(which, &info->total, &info->reserved, &info->used);
    if (!error) info->free = info->total - info->used - info->reserved;
    return error;
}

int nvmlDeviceGetTemperatureV(device *which, temperature_v1 *temperature) {
    long long value = 0;
    if (temperature->version != (sizeof *temperature | 1u << 24)) return ARGUMENT_VERSION_MISMATCH;
    int error = field_number(which, "temperature", &value);
    temperature->temperature = (int)value;
    return error;
}

/* `processes` is `pid:bytes` with spaces between; no bytes are bytes that nobody knows. */
int nvmlDeviceGetComputeRunningProcesses_v3(device *which, unsigned *count, process *found) {
    char text[512], *rest = NULL, *one;
    unsigned room = *count, n = 0;
    int error = field(which, "processes", text, sizeof text);
    if (error) return error;
    for (one = strtok_r(text, " ", &rest); one; one = strtok_r(NULL, " ", &rest), n++) {
        if (n >= room) continue;
        char *used = strchr(one, ':');
        found[n].pid = (unsigned)strtoul(one, NULL, 10);
        found[n].used = used && used[1] ? strtoull(used + 1, NULL, 10) : ~0ULL;
        found[n].gpu_instance = found[n].compute_instance = ~0u;
    }
    *count = n;
    return n > room ? INSUFFICIENT_SIZE : SUCCESS;
}
#endif

int nvmlDeviceGetMemoryInfo(device *which, memory_v1 *info) {
    unsigned long long reserved = 0;
    int error = memory(which, &info->total, &reserved, &info->used);
    info->used += reserved;
    if (!error) info->free = info->total - info->used;
    return error;
}

int nvmlDeviceGetTemperature(device *which, int sensor, unsigned *temperature) {
    long long value = 0;
    (void)sensor;
    int error = field_number(which, "temperature", &value);
    *temperature = (unsigned)value;
    return error;
}

int nvmlDeviceGetPowerUsage(device *which, unsigned *milliwatts) {
    long long value = 0;
    int error = field_number(which, "power", &value);
    *milliwatts = (unsigned)value;
    return error;
}

/* `energy` in mJ; `energy.milliwatts` lets it grow by the clock. */
int nvmlDeviceGetTotalEnergyConsumption(device *which, unsigned long long *millijoules) {
    struct timespec now;
    long long value = 0, milliwatts = 0;
    int error = field_number(which, "energy", &value);
    if (error) return error;
    if (!field_number(which, "energy.milliwatts", &milliwatts)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        value += (long long)((now.tv_sec + now.tv_nsec / 1e9) * (double)milliwatts);
    }
    *millijoules = (unsigned long long)value;
    return SUCCESS;
}

/* `mig` is how many instances there could be; the n-th is there when it has a name. */
int nvmlDeviceGetMigMode(device *which, unsigned *current, unsigned *pending) {
    long long value = 0;
    int error = field_number(which, "mig", &value);
    *current = *pending = value > 0;
    return error;
}

int nvmlDeviceGetMaxMigDeviceCount(device *which, unsigned *count) {
    long long value = 0;
    int error = field_number(which, "mig", &value);
    *count = (unsigned)value;
    return error;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device *which, unsigned n, device **handle) {
    char text[128];
    device part = {which->index, (int)n};
    devices[which->index][n] = part;
    *handle = &devices[which->index][n];
    return field(*handle, "name", text, sizeof text) ? NOT_FOUND : SUCCESS;
}
