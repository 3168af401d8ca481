/* The NVML functions that an exporter calls, answered from the model. */
#define _GNU_SOURCE
#include "shim.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIB (UINT64_C(1) << 20)
#define NVLINKS 18
#define DRIVER_RESERVED_MIB 512

/* Both open a function: they declare `visit` and leave with the driver's error, if there is one. */
#define ENTER(name)                                                                                                    \
  struct visit visit;                                                                                                  \
  do {                                                                                                                 \
    nvmlReturn_t entered = gate_enter(CALL_##name, &visit);                                                            \
    if (entered != NVML_SUCCESS)                                                                                       \
      return entered;                                                                                                  \
  } while (0)
#define ENTER_DEVICE(name, handle, output)                                                                             \
  struct visit visit;                                                                                                  \
  do {                                                                                                                 \
    nvmlReturn_t entered = gate_enter_device(CALL_##name, handle, 0, &visit);                                          \
    if (entered != NVML_SUCCESS)                                                                                       \
      return entered;                                                                                                  \
    if ((const void *)(output) == NULL)                                                                                \
      return NVML_ERROR_INVALID_ARGUMENT;                                                                              \
  } while (0)

static unsigned garbage_or(const struct visit *visit, unsigned value, unsigned garbage) {
  if (!visit->garbage)
    return value;
  return visit->has_value ? (unsigned)visit->value : garbage;
}

static nvmlReturn_t copy_text(char *target, unsigned size, const char *text) {
  if (target == NULL)
    return NVML_ERROR_INVALID_ARGUMENT;
  if (strlen(text) >= size)
    return NVML_ERROR_INSUFFICIENT_SIZE;
  memcpy(target, text, strlen(text) + 1);
  return NVML_SUCCESS;
}

/* ---- library and system ---- */

SHIM_EXPORT nvmlReturn_t nvmlInit(void) {
  return gate_initialise(CALL_nvmlInit);
}

SHIM_EXPORT nvmlReturn_t nvmlInit_v2(void) {
  return gate_initialise(CALL_nvmlInit_v2);
}

SHIM_EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  return gate_initialise(CALL_nvmlInitWithFlags);
}

SHIM_EXPORT nvmlReturn_t nvmlShutdown(void) {
  return gate_shutdown();
}

SHIM_EXPORT const char *nvmlErrorString(nvmlReturn_t code) {
  switch (code) {
  case NVML_SUCCESS:
    return "The operation was successful";
  case NVML_ERROR_UNINITIALIZED:
    return "Uninitialized";
  case NVML_ERROR_INVALID_ARGUMENT:
    return "Invalid Argument";
  case NVML_ERROR_NOT_SUPPORTED:
    return "Not Supported";
  case NVML_ERROR_NO_PERMISSION:
    return "Insufficient Permissions";
  case NVML_ERROR_NOT_FOUND:
    return "Not Found";
  case NVML_ERROR_INSUFFICIENT_SIZE:
    return "Insufficient Size";
  case NVML_ERROR_DRIVER_NOT_LOADED:
    return "Driver Not Loaded";
  case NVML_ERROR_TIMEOUT:
    return "Timeout";
  case NVML_ERROR_LIBRARY_NOT_FOUND:
    return "NVML Shared Library Not Found";
  case NVML_ERROR_FUNCTION_NOT_FOUND:
    return "Function Not Found";
  case NVML_ERROR_GPU_IS_LOST:
    return "GPU is lost";
  case NVML_ERROR_RESET_REQUIRED:
    return "GPU requires reset";
  case NVML_ERROR_OPERATING_SYSTEM:
    return "The operating system has blocked the request";
  case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
    return "Driver/library version mismatch";
  case NVML_ERROR_MEMORY:
    return "Insufficient Memory";
  case NVML_ERROR_NO_DATA:
    return "No data";
  case NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
    return "Argument version mismatch";
  case NVML_ERROR_DEPRECATED:
    return "This API has been deprecated";
  case NVML_ERROR_NOT_READY:
    return "System is not ready";
  case NVML_ERROR_GPU_NOT_FOUND:
    return "No GPUs were found";
  default:
    return "Unknown Error";
  }
}

SHIM_EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
  ENTER(nvmlSystemGetDriverVersion);
  return copy_text(version, length, scenario.driver_version);
}

SHIM_EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) {
  ENTER(nvmlSystemGetNVMLVersion);
  return copy_text(version, length, scenario.nvml_version);
}

SHIM_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
  ENTER(nvmlSystemGetCudaDriverVersion);
  *version = scenario.cuda_version;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
  ENTER(nvmlSystemGetCudaDriverVersion_v2);
  *version = scenario.cuda_version;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
  ENTER(nvmlSystemGetProcessName);
  for (int gpu = 0; gpu < scenario.device_count; gpu++)
    for (int i = 0; i < scenario.devices[gpu].process_count; i++)
      if (scenario.devices[gpu].processes[i].pid == pid) {
        char text[64];
        snprintf(text, sizeof text, "simulated-process-%u", pid);
        return copy_text(name, length, text);
      }
  return NVML_ERROR_NOT_FOUND;
}

/* ---- finding devices, and what they are ---- */

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
  ENTER(nvmlDeviceGetCount_v2);
  *count = (unsigned)scenario.device_count;
  return NVML_SUCCESS;
}

static struct device *find_device(bool (*matches)(const struct device *device, const void *wanted),
                                  const void *wanted) {
  for (int gpu = 0; gpu < scenario.device_count; gpu++)
    if (matches(&scenario.devices[gpu], wanted))
      return &scenario.devices[gpu];
  return NULL;
}

static nvmlReturn_t look_up(enum call_id call, struct device *device, nvmlDevice_t *handle, nvmlReturn_t missing) {
  if (device != NULL)
    return gate_enter_lookup(call, device, handle);
  struct visit visit;
  nvmlReturn_t code = gate_enter(call, &visit);
  return code == NVML_SUCCESS ? missing : code;
}

static bool has_index(const struct device *device, const void *index) {
  return (unsigned)device->index == *(const unsigned *)index;
}

static bool has_uuid(const struct device *device, const void *uuid) {
  return strcmp(device->uuid, uuid) == 0;
}

static void format_bus_id(const struct device *device, int domain_digits, char text[32]) {
  snprintf(text, 32, "%0*X:%02X:00.0", domain_digits, 0, 0x10 + device->index);
}

static bool has_bus_id(const struct device *device, const void *bus_id) {
  char full[32], legacy[32];
  format_bus_id(device, 8, full);
  format_bus_id(device, 4, legacy);
  return strcasecmp(full, bus_id) == 0 || strcasecmp(legacy, bus_id) == 0;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *handle) {
  return look_up(CALL_nvmlDeviceGetHandleByIndex_v2, find_device(has_index, &index), handle,
                 NVML_ERROR_INVALID_ARGUMENT);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle) {
  return look_up(CALL_nvmlDeviceGetHandleByUUID, find_device(has_uuid, uuid), handle, NVML_ERROR_NOT_FOUND);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *handle) {
  return look_up(CALL_nvmlDeviceGetHandleByPciBusId_v2, find_device(has_bus_id, bus_id), handle, NVML_ERROR_NOT_FOUND);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t handle, char *uuid, unsigned length) {
  ENTER_DEVICE(nvmlDeviceGetUUID, handle, uuid);
  return copy_text(uuid, length, visit.device->uuid);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t handle, char *name, unsigned length) {
  ENTER_DEVICE(nvmlDeviceGetName, handle, name);
  return copy_text(name, length, visit.device->name);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t handle, char *serial, unsigned length) {
  ENTER_DEVICE(nvmlDeviceGetSerial, handle, serial);
  char text[30];
  snprintf(text, sizeof text, "13200000000%02d", visit.device->index);
  return copy_text(serial, length, text);
}

/* A getter of one unsigned that only reads the model. */
#define UNSIGNED_GETTER(name, expression)                                                                              \
  SHIM_EXPORT nvmlReturn_t name(nvmlDevice_t handle, unsigned *value) {                                                \
    ENTER_DEVICE(name, handle, value);                                                                                 \
    const struct device *device = visit.device;                                                                        \
    (void)device;                                                                                                      \
    *value = garbage_or(&visit, (unsigned)(expression), UINT32_MAX);                                                   \
    return NVML_SUCCESS;                                                                                               \
  }

UNSIGNED_GETTER(nvmlDeviceGetIndex, device->index)
UNSIGNED_GETTER(nvmlDeviceGetMinorNumber, device->index)
UNSIGNED_GETTER(nvmlDeviceGetBrand, device->architecture >= 7 ? 14 /* NVIDIA */ : 2 /* Tesla */)
UNSIGNED_GETTER(nvmlDeviceGetArchitecture, device->architecture)
UNSIGNED_GETTER(nvmlDeviceGetNumGpuCores, device->cores)
UNSIGNED_GETTER(nvmlDeviceGetMemoryBusWidth, device->bus_width_bits)
UNSIGNED_GETTER(nvmlDeviceGetPersistenceMode, device->persistence)
UNSIGNED_GETTER(nvmlDeviceGetPowerManagementMode, 1)
UNSIGNED_GETTER(nvmlDeviceGetEnforcedPowerLimit, device->limit_mw)
UNSIGNED_GETTER(nvmlDeviceGetPowerManagementLimit, device->limit_mw)
UNSIGNED_GETTER(nvmlDeviceGetPowerManagementDefaultLimit, device->limit_default_mw)
UNSIGNED_GETTER(nvmlDeviceGetPerformanceState, level_at(device, device->pstate, visit.t_ns))
UNSIGNED_GETTER(nvmlDeviceIsMigDeviceHandle, 0)

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t handle, unsigned *min_mw,
                                                                      unsigned *max_mw) {
  ENTER_DEVICE(nvmlDeviceGetPowerManagementLimitConstraints, handle, min_mw);
  *min_mw = visit.device->limit_min_mw;
  *max_mw = visit.device->limit_max_mw;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t handle, int *major, int *minor) {
  ENTER_DEVICE(nvmlDeviceGetCudaComputeCapability, handle, major);
  *major = (int)visit.device->compute_major;
  *minor = (int)visit.device->compute_minor;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t handle, nvmlPciInfo_t *info) {
  ENTER_DEVICE(nvmlDeviceGetPciInfo_v3, handle, info);
  memset(info, 0, sizeof *info);
  info->bus = 0x10 + (unsigned)visit.device->index;
  info->pciDeviceId = 0x10DE; /* the vendor; no product is claimed */
  info->pciSubSystemId = 0x10DE;
  char legacy[32];
  format_bus_id(visit.device, 8, info->busId);
  format_bus_id(visit.device, 4, legacy);
  snprintf(info->busIdLegacy, sizeof info->busIdLegacy, "%.15s", legacy);
  return NVML_SUCCESS;
}

/* ---- MIG ---- */

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t handle, unsigned *current, unsigned *pending) {
  ENTER_DEVICE(nvmlDeviceGetMigMode, handle, current);
  if (visit.device->mig == MIG_UNSUPPORTED)
    return NVML_ERROR_NOT_SUPPORTED;
  *current = *pending = visit.device->mig == MIG_ON;
  return NVML_SUCCESS;
}

/* The model has no MIG device handles, so these answer as for a physical GPU. */
#define UNSUPPORTED(name)                                                                                              \
  SHIM_EXPORT nvmlReturn_t name(nvmlDevice_t handle) {                                                                 \
    ENTER_DEVICE(name, handle, handle);                                                                                \
    return NVML_ERROR_NOT_SUPPORTED;                                                                                   \
  }

UNSUPPORTED(nvmlDeviceGetGpuInstanceId)
UNSUPPORTED(nvmlDeviceGetComputeInstanceId)
UNSUPPORTED(nvmlDeviceGetMaxMigDeviceCount)
UNSUPPORTED(nvmlDeviceGetMigDeviceHandleByIndex)
UNSUPPORTED(nvmlDeviceGetFanSpeed)

/* ---- power and energy ---- */

static bool has_instant(const struct device *device) {
  return device->instant.period_ns > 0;
}

static bool has_average(const struct device *device) {
  return device->average.period_ns > 0;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t handle, unsigned *mw) {
  ENTER_DEVICE(nvmlDeviceGetPowerUsage, handle, mw);
  const struct device *device = visit.device;
  if (device->power_usage == USAGE_AVERAGE && has_average(device))
    *mw = garbage_or(&visit, sensor_average_mw(device, visit.t_ns), UINT32_MAX);
  else if (device->power_usage == USAGE_INSTANT && has_instant(device))
    *mw = garbage_or(&visit, sensor_instant_mw(device, visit.t_ns), UINT32_MAX);
  else
    return NVML_ERROR_NOT_SUPPORTED;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t handle, unsigned long long *mj) {
  ENTER_DEVICE(nvmlDeviceGetTotalEnergyConsumption, handle, mj);
  if (visit.device->counter_period_ns == 0)
    return NVML_ERROR_NOT_SUPPORTED;
  *mj = sensor_energy_mj(visit.device, visit.t_ns);
  if (visit.garbage)
    *mj = visit.has_value ? (unsigned long long)visit.value : UINT64_MAX;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t handle, unsigned type, unsigned long long since_us,
                                              int *value_type, unsigned *count, nvmlSample_t *samples) {
  ENTER_DEVICE(nvmlDeviceGetSamples, handle, count);
  if (type == SAMPLES_MODULE_POWER || type >= SAMPLES_TYPES)
    return NVML_ERROR_INVALID_ARGUMENT;
  int depth = sensor_ring_depth(visit.device, (int)type);
  if (depth == 0) /* an H200 answers NOT_FOUND for its clock rings, which are never filled */
    return type > SAMPLES_MEMORY_UTIL ? NVML_ERROR_NOT_FOUND : NVML_ERROR_NOT_SUPPORTED;
  if (value_type != NULL)
    *value_type = VALUE_UNSIGNED_INT;
  if (samples == NULL) { /* the sizing call announces the whole ring; the next call may fill less */
    *count = (unsigned)depth;
    return NVML_SUCCESS;
  }
  if (*count == 0)
    return NVML_ERROR_INVALID_ARGUMENT;
  gate_pay(&visit);
  int filled = sensor_ring(visit.device, (int)type, gate_now_ns(), since_us, samples,
                           *count > INT_MAX ? INT_MAX : (int)*count);
  *count = filled > 0 ? (unsigned)filled : 0;
  for (int i = 0; visit.garbage && i < filled; i++)
    samples[i].sampleValue.uiVal = garbage_or(&visit, 0, UINT32_MAX);
  return filled > 0 ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

/* ---- field values ---- */

static nvmlReturn_t put_u32(nvmlFieldValue_t *value, double number) {
  value->valueType = VALUE_UNSIGNED_INT;
  value->value.ullVal = 0;
  value->value.uiVal = (unsigned)number;
  return NVML_SUCCESS;
}

static nvmlReturn_t put_u64(nvmlFieldValue_t *value, uint64_t number) {
  value->valueType = VALUE_UNSIGNED_LONG_LONG;
  value->value.ullVal = number;
  return NVML_SUCCESS;
}

static uint64_t throttled_ns(const struct device *device, enum throttle reason, int64_t t_ns) {
  return t_ns <= 0 ? 0 : (uint64_t)llround(level_integral(device, device->throttle[reason], 0, t_ns) * 1e9);
}

/* Bytes through a link since the epoch, from the activity of its GPM metric. */
static uint64_t moved_bytes(const struct device *device, unsigned metric, int64_t t_ns) {
  return t_ns <= 0 ? 0 : (uint64_t)(level_integral(device, device->gpm_metrics[metric], 0, t_ns) * (double)MIB);
}

static nvmlReturn_t put_nvlink(const struct device *device, nvmlFieldValue_t *value, bool transmit, unsigned divisor,
                               int64_t t_ns) {
  if (!device->has_nvlink)
    return NVML_ERROR_NOT_SUPPORTED;
  uint64_t bytes = moved_bytes(device, transmit ? 61 : 60, t_ns);
  if (value->scopeId != UINT32_MAX) {
    if (value->scopeId >= NVLINKS)
      return NVML_ERROR_INVALID_ARGUMENT;
    bytes /= NVLINKS;
  }
  return put_u64(value, bytes / divisor);
}

static nvmlReturn_t put_power(const struct device *device, nvmlFieldValue_t *value, int64_t t_ns) {
  if (!device->power_fields)
    return NVML_ERROR_NOT_SUPPORTED;
  bool average = value->fieldId == 185;
  if (average ? !has_average(device) : !has_instant(device))
    return NVML_ERROR_NOT_SUPPORTED;
  if (value->scopeId == SCOPE_GPU)
    return put_u32(value, average ? sensor_average_mw(device, t_ns) : sensor_instant_mw(device, t_ns));
  if (value->scopeId == SCOPE_MEMORY && average && (device->memory_w.on > 0 || device->memory_w.off > 0))
    return put_u32(value, sensor_memory_mw(device, t_ns));
  return NVML_ERROR_NOT_SUPPORTED;
}

static nvmlReturn_t put_field(const struct device *device, nvmlFieldValue_t *value, int64_t t_ns) {
  switch (value->fieldId) {
  case 3: /* single bit, volatile */
    return put_u64(value, device->ecc_volatile[0]);
  case 4:
    return put_u64(value, device->ecc_volatile[1]);
  case 5: /* single bit, aggregate */
    return put_u64(value, device->ecc_aggregate[0]);
  case 6:
    return put_u64(value, device->ecc_aggregate[1]);
  case 74:
    return put_u64(value, throttled_ns(device, THROTTLE_SW_POWER_CAP, t_ns));
  case 75: /* legacy: every thermal reason together */
    return put_u64(value, throttled_ns(device, THROTTLE_SW_THERMAL, t_ns) +
                              throttled_ns(device, THROTTLE_HW_THERMAL, t_ns));
  case 76:
    return put_u64(value, throttled_ns(device, THROTTLE_SYNC_BOOST, t_ns));
  case 77:
    return put_u64(value, throttled_ns(device, THROTTLE_BOARD_LIMIT, t_ns));
  case 78:
    return put_u64(value, throttled_ns(device, THROTTLE_LOW_UTILIZATION, t_ns));
  case 79:
    return put_u64(value, throttled_ns(device, THROTTLE_RELIABILITY, t_ns));
  case 81:
    return put_u64(value, throttled_ns(device, THROTTLE_BASE_CLOCKS, t_ns));
  case 82:
    if (!device->has_memory_temperature)
      return NVML_ERROR_NOT_SUPPORTED;
    return put_u32(value, level_at(device, device->memory_temperature_c, t_ns));
  case 83:
  case 191:
    if (device->counter_period_ns == 0 || (value->fieldId == 191 && value->scopeId != SCOPE_GPU))
      return NVML_ERROR_NOT_SUPPORTED;
    return put_u64(value, sensor_energy_mj(device, t_ns));
  case 138: /* data, and raw with its overhead, which the model leaves out; KiB */
  case 140:
    return put_nvlink(device, value, true, 1024, t_ns);
  case 139:
  case 141:
    return put_nvlink(device, value, false, 1024, t_ns);
  case 142:
  case 143:
  case 144:
  case 145: {
    const uint32_t rows[] = {device->remapped_correctable, device->remapped_uncorrectable, device->remap_pending,
                             device->remap_failed};
    return device->has_remapped_rows ? put_u32(value, rows[value->fieldId - 142]) : NVML_ERROR_NOT_SUPPORTED;
  }
  case 185:
  case 186:
    return put_power(device, value, t_ns);
  case 187:
  case 188:
  case 189:
  case 190:
  case 192: {
    const unsigned limits[] = {device->limit_min_mw, device->limit_max_mw, device->limit_default_mw,
                               device->limit_mw,     0 /* 191 */,          device->limit_mw};
    return value->scopeId == SCOPE_GPU ? put_u32(value, limits[value->fieldId - 187]) : NVML_ERROR_NOT_SUPPORTED;
  }
  case 197:
    return put_u64(value, moved_bytes(device, 20, t_ns));
  case 198:
    return put_u64(value, moved_bytes(device, 21, t_ns));
  case 201: /* packets; 128 bytes each is this model's choice */
    return put_nvlink(device, value, true, 128, t_ns);
  case 202:
    return put_nvlink(device, value, true, 1, t_ns);
  case 203:
    return put_nvlink(device, value, false, 128, t_ns);
  case 204:
    return put_nvlink(device, value, false, 1, t_ns);
  case 230:
    return put_u32(value, device->recovery_action);
  case 269:
    return put_u64(value, throttled_ns(device, THROTTLE_SW_THERMAL, t_ns));
  case 270:
    return put_u64(value, throttled_ns(device, THROTTLE_HW_THERMAL, t_ns));
  case 271:
    return put_u64(value, throttled_ns(device, THROTTLE_HW_POWER_BRAKE, t_ns));
  default:
    return NVML_ERROR_NOT_SUPPORTED;
  }
}

static void spoil(nvmlFieldValue_t *value, bool has_number, double number) {
  if (value->valueType == VALUE_UNSIGNED_INT)
    value->value.uiVal = has_number ? (unsigned)number : UINT32_MAX;
  else
    value->value.ullVal = has_number ? (unsigned long long)number : UINT64_MAX;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t handle, int count, nvmlFieldValue_t *values) {
  if (count < 0 || values == NULL)
    return NVML_ERROR_INVALID_ARGUMENT;
  double extra_us = 0;
  for (int i = 0; i < count; i++)
    if (values[i].fieldId < MAX_FIELD_ID)
      extra_us += scenario.field_latency_us[values[i].fieldId];
  struct visit visit;
  nvmlReturn_t code = gate_enter_device(CALL_nvmlDeviceGetFieldValues, handle, extra_us, &visit);
  if (code != NVML_SUCCESS)
    return code;
  uint64_t stamp_us = clock_stamp_us(visit.t_ns);
  for (int i = 0; i < count; i++) {
    nvmlFieldValue_t *value = &values[i];
    value->timestamp = (int64_t)stamp_us;
    value->latencyUsec = (int64_t)scenario.latency[CALL_nvmlDeviceGetFieldValues].us;
    if (value->fieldId < MAX_FIELD_ID)
      value->latencyUsec += (int64_t)scenario.field_latency_us[value->fieldId];
    value->nvmlReturn = put_field(visit.device, value, visit.t_ns);
    if (visit.garbage && value->nvmlReturn == NVML_SUCCESS)
      spoil(value, visit.has_value, visit.value);
    for (int f = 0; f < visit.field_fault_count; f++) {
      const struct field_fault *fault = &visit.field_faults[f];
      if (fault->field != (int)value->fieldId)
        continue;
      if (!fault->garbage)
        value->nvmlReturn = fault->code;
      else if (value->nvmlReturn == NVML_SUCCESS)
        spoil(value, fault->has_value, fault->value);
    }
  }
  return NVML_SUCCESS;
}

/* ---- state ---- */

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t handle, nvmlUtilization_t *utilization) {
  ENTER_DEVICE(nvmlDeviceGetUtilizationRates, handle, utilization);
  if (visit.device->mig == MIG_ON)
    return NVML_ERROR_NOT_SUPPORTED;
  sensor_utilization(visit.device, visit.t_ns, utilization);
  utilization->gpu = garbage_or(&visit, utilization->gpu, UINT32_MAX);
  utilization->memory = garbage_or(&visit, utilization->memory, UINT32_MAX);
  return NVML_SUCCESS;
}

static bool process_runs(const struct process *process, int64_t t_ns) {
  return t_ns >= process->from_ns && t_ns < process->to_ns;
}

static uint64_t used_bytes(const struct device *device, int64_t t_ns) {
  double mib = level_at(device, device->memory_used_mib, t_ns);
  if (mib < 0) {
    mib = 0;
    for (int i = 0; i < device->process_count; i++)
      if (process_runs(&device->processes[i], t_ns))
        mib += device->processes[i].memory_mib;
  }
  uint64_t limit = (device->memory_mib - DRIVER_RESERVED_MIB) * MIB, used = (uint64_t)(mib * (double)MIB);
  return used < limit ? used : limit;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t handle, nvmlMemory_t *memory) {
  ENTER_DEVICE(nvmlDeviceGetMemoryInfo, handle, memory);
  memory->total = visit.device->memory_mib * MIB;
  memory->used = used_bytes(visit.device, visit.t_ns) + DRIVER_RESERVED_MIB * MIB; /* v1 counts the reserve as used */
  memory->free = memory->total - memory->used;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t handle, nvmlMemory_v2_t *memory) {
  ENTER_DEVICE(nvmlDeviceGetMemoryInfo_v2, handle, memory);
  if (memory->version != MEMORY_V2_VERSION)
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  memory->total = visit.device->memory_mib * MIB;
  memory->reserved = DRIVER_RESERVED_MIB * MIB;
  memory->used = used_bytes(visit.device, visit.t_ns);
  memory->free = memory->total - memory->used - memory->reserved;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t handle, unsigned type, unsigned *mhz) {
  ENTER_DEVICE(nvmlDeviceGetClockInfo, handle, mhz);
  if (type > CLOCK_VIDEO)
    return NVML_ERROR_INVALID_ARGUMENT;
  struct pair level = type == CLOCK_MEMORY ? visit.device->memory_mhz : visit.device->sm_mhz;
  *mhz = garbage_or(&visit, (unsigned)level_at(visit.device, level, visit.t_ns), UINT32_MAX);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t handle, unsigned type, unsigned *mhz) {
  ENTER_DEVICE(nvmlDeviceGetMaxClockInfo, handle, mhz);
  if (type > CLOCK_VIDEO)
    return NVML_ERROR_INVALID_ARGUMENT;
  *mhz = type == CLOCK_MEMORY ? visit.device->max_memory_mhz : visit.device->max_sm_mhz;
  return NVML_SUCCESS;
}

/* The sampled mask shows a reason while it takes at least half of the time; GpuIdle when nothing runs. */
static uint64_t event_reasons(const struct visit *visit) {
  static const uint64_t bits[THROTTLE_COUNT] = {
      [THROTTLE_SW_POWER_CAP] = 0x4,    [THROTTLE_SW_THERMAL] = 0x20,   [THROTTLE_HW_THERMAL] = 0x40 | 0x8,
      [THROTTLE_HW_POWER_BRAKE] = 0x80 | 0x8, [THROTTLE_SYNC_BOOST] = 0x10,
      [THROTTLE_BOARD_LIMIT] = 0x200,   [THROTTLE_RELIABILITY] = 0x400,
  };
  uint64_t mask = 0;
  for (int reason = 0; reason < THROTTLE_COUNT; reason++)
    if (level_at(visit->device, visit->device->throttle[reason], visit->t_ns) >= 0.5)
      mask |= bits[reason];
  if (mask == 0 && level_at(visit->device, visit->device->utilization, visit->t_ns) == 0)
    mask = 0x1;
  return mask;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t handle, unsigned long long *reasons) {
  ENTER_DEVICE(nvmlDeviceGetCurrentClocksEventReasons, handle, reasons);
  *reasons = event_reasons(&visit);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t handle, unsigned long long *reasons) {
  ENTER_DEVICE(nvmlDeviceGetCurrentClocksThrottleReasons, handle, reasons);
  *reasons = event_reasons(&visit);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t handle, unsigned policy, nvmlViolationTime_t *time) {
  ENTER_DEVICE(nvmlDeviceGetViolationStatus, handle, time);
  const struct device *device = visit.device;
  static const struct {
    unsigned policy;
    enum throttle reason;
  } policies[] = {{0, THROTTLE_SW_POWER_CAP}, {2, THROTTLE_SYNC_BOOST},  {3, THROTTLE_BOARD_LIMIT},
                  {4, THROTTLE_LOW_UTILIZATION}, {5, THROTTLE_RELIABILITY}, {11, THROTTLE_BASE_CLOCKS}};
  time->referenceTime = clock_stamp_us(visit.t_ns);
  if (policy == 1) { /* thermal */
    time->violationTime = throttled_ns(device, THROTTLE_SW_THERMAL, visit.t_ns) +
                          throttled_ns(device, THROTTLE_HW_THERMAL, visit.t_ns);
    return NVML_SUCCESS;
  }
  for (size_t i = 0; i < sizeof policies / sizeof *policies; i++)
    if (policies[i].policy == policy) {
      time->violationTime = throttled_ns(device, policies[i].reason, visit.t_ns);
      return NVML_SUCCESS;
    }
  return NVML_ERROR_NOT_SUPPORTED;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t handle, unsigned sensor, unsigned *celsius) {
  ENTER_DEVICE(nvmlDeviceGetTemperature, handle, celsius);
  if (sensor != 0)
    return NVML_ERROR_INVALID_ARGUMENT;
  *celsius = garbage_or(&visit, (unsigned)level_at(visit.device, visit.device->temperature_c, visit.t_ns), 255);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t handle, nvmlTemperature_v1_t *temperature) {
  ENTER_DEVICE(nvmlDeviceGetTemperatureV, handle, temperature);
  if (temperature->version != TEMPERATURE_V1_VERSION)
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  if (temperature->sensorType != 0)
    return NVML_ERROR_NOT_SUPPORTED;
  temperature->temperature =
      (int)garbage_or(&visit, (unsigned)level_at(visit.device, visit.device->temperature_c, visit.t_ns), 255);
  return NVML_SUCCESS;
}

/* KiB/s through PCIe; a real driver watches for 20 ms before it answers (see `latency profile=h200`). */
SHIM_EXPORT nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t handle, unsigned counter, unsigned *kib_per_s) {
  ENTER_DEVICE(nvmlDeviceGetPcieThroughput, handle, kib_per_s);
  if (counter > 1)
    return NVML_ERROR_INVALID_ARGUMENT;
  double mib = level_integral(visit.device, visit.device->gpm_metrics[20 + counter], visit.t_ns - 20 * NS_PER_MS,
                              visit.t_ns);
  *kib_per_s = garbage_or(&visit, (unsigned)(mib / 0.020 * 1024), UINT32_MAX);
  return NVML_SUCCESS;
}

/* ---- health ---- */

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t handle, unsigned error_type, unsigned counter_type,
                                                     unsigned long long *count) {
  ENTER_DEVICE(nvmlDeviceGetTotalEccErrors, handle, count);
  if (error_type > 1 || counter_type > 1)
    return NVML_ERROR_INVALID_ARGUMENT;
  *count = (counter_type == 0 ? visit.device->ecc_volatile : visit.device->ecc_aggregate)[error_type];
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t handle, unsigned error_type,
                                                         unsigned counter_type, unsigned location,
                                                         unsigned long long *count) {
  ENTER_DEVICE(nvmlDeviceGetMemoryErrorCounter, handle, count);
  if (error_type > 1 || counter_type > 1)
    return NVML_ERROR_INVALID_ARGUMENT;
  if (location != 2) /* device memory; the model has no errors in caches */
    return NVML_ERROR_NOT_SUPPORTED;
  *count = (counter_type == 0 ? visit.device->ecc_volatile : visit.device->ecc_aggregate)[error_type];
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t handle, unsigned *correctable, unsigned *uncorrectable,
                                                   unsigned *pending, unsigned *failed) {
  ENTER_DEVICE(nvmlDeviceGetRemappedRows, handle, correctable);
  if (!visit.device->has_remapped_rows)
    return NVML_ERROR_NOT_SUPPORTED;
  *correctable = visit.device->remapped_correctable;
  *uncorrectable = visit.device->remapped_uncorrectable;
  *pending = visit.device->remap_pending;
  *failed = visit.device->remap_failed;
  return NVML_SUCCESS;
}

/* ---- processes ---- */

static nvmlReturn_t list_processes(const struct visit *visit, unsigned *count, nvmlProcessInfo_t *infos) {
  const struct device *device = visit->device;
  unsigned running = 0, capacity = infos == NULL ? 0 : *count;
  for (int i = 0; i < device->process_count; i++) {
    if (!process_runs(&device->processes[i], visit->t_ns))
      continue;
    if (running < capacity)
      infos[running] = (nvmlProcessInfo_t){.pid = device->processes[i].pid,
                                           .usedGpuMemory = (uint64_t)(device->processes[i].memory_mib * (double)MIB),
                                           .gpuInstanceId = NO_INSTANCE,
                                           .computeInstanceId = NO_INSTANCE};
    running++;
  }
  *count = running;
  return running > capacity ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t handle, unsigned *count,
                                                                 nvmlProcessInfo_t *infos) {
  ENTER_DEVICE(nvmlDeviceGetComputeRunningProcesses_v3, handle, count);
  return list_processes(&visit, count, infos);
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t handle, unsigned *count,
                                                                    nvmlProcessInfo_t *infos) {
  ENTER_DEVICE(nvmlDeviceGetMPSComputeRunningProcesses_v3, handle, count);
  (void)infos;
  *count = 0;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t handle, unsigned *count,
                                                                  nvmlProcessInfo_t *infos) {
  ENTER_DEVICE(nvmlDeviceGetGraphicsRunningProcesses_v3, handle, count);
  (void)infos;
  *count = 0;
  return NVML_SUCCESS;
}

/* One sample per process that uses the SMs, stamped with the end of the last utilization interval. */
static unsigned sampled_processes(const struct visit *visit, uint64_t since_us, unsigned capacity,
                                  nvmlProcessUtilizationInfo_v1_t *infos) {
  const struct device *device = visit->device;
  int64_t end_ns = sensor_utilization_slot_ns(device, visit->t_ns);
  uint64_t stamp_us = clock_stamp_us(end_ns);
  if (stamp_us <= since_us)
    return 0;
  unsigned count = 0;
  for (int i = 0; i < device->process_count; i++) {
    const struct process *process = &device->processes[i];
    double percent_s = level_integral(device, process->sm_percent, end_ns - 200 * NS_PER_MS, end_ns);
    unsigned sm = (unsigned)llround(percent_s / 0.2);
    if (!process_runs(process, end_ns) || sm == 0)
      continue;
    if (count < capacity)
      infos[count] = (nvmlProcessUtilizationInfo_v1_t){.timeStamp = stamp_us, .pid = process->pid, .smUtil = sm};
    count++;
  }
  return count;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t handle, nvmlProcessUtilizationSample_t *samples,
                                                         unsigned *count, unsigned long long since_us) {
  ENTER_DEVICE(nvmlDeviceGetProcessUtilization, handle, count);
  if (visit.device->mig == MIG_ON)
    return NVML_ERROR_NOT_SUPPORTED;
  nvmlProcessUtilizationInfo_v1_t infos[MAX_PROCESSES];
  unsigned found = sampled_processes(&visit, since_us, MAX_PROCESSES, infos);
  unsigned capacity = samples == NULL ? 0 : *count;
  *count = found;
  if (found == 0)
    return NVML_ERROR_NOT_FOUND;
  if (found > capacity)
    return NVML_ERROR_INSUFFICIENT_SIZE;
  for (unsigned i = 0; i < found; i++)
    samples[i] = (nvmlProcessUtilizationSample_t){.pid = infos[i].pid,
                                                  .timeStamp = infos[i].timeStamp,
                                                  .smUtil = garbage_or(&visit, infos[i].smUtil, UINT32_MAX)};
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t handle,
                                                               nvmlProcessesUtilizationInfo_v1_t *info) {
  ENTER_DEVICE(nvmlDeviceGetProcessesUtilizationInfo, handle, info);
  if (info->version != PROCESSES_UTILIZATION_V1_VERSION)
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  if (visit.device->mig == MIG_ON)
    return NVML_ERROR_NOT_SUPPORTED;
  unsigned capacity = info->procUtilArray == NULL ? 0 : info->processSamplesCount;
  unsigned found = sampled_processes(&visit, info->lastSeenTimeStamp, capacity, info->procUtilArray);
  info->processSamplesCount = found;
  if (found == 0)
    return NVML_ERROR_NOT_FOUND;
  return found > capacity ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

/* ---- GPM ---- */

/* The counters are a function of time, so a sample is the instant it was taken at. */
struct nvml_gpm_sample {
  struct device *device;
  int64_t read_ns, refresh_ns;
};

SHIM_EXPORT nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t handle, nvmlGpmSupport_t *support) {
  ENTER_DEVICE(nvmlGpmQueryDeviceSupport, handle, support);
  if (support->version != GPM_VERSION)
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  support->isSupportedDevice = visit.device->gpm != GPM_OFF;
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t *sample) {
  ENTER(nvmlGpmSampleAlloc);
  *sample = calloc(1, sizeof **sample);
  return *sample == NULL ? NVML_ERROR_MEMORY : NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t sample) {
  ENTER(nvmlGpmSampleFree);
  if (sample == NULL)
    return NVML_ERROR_INVALID_ARGUMENT;
  free(sample);
  return NVML_SUCCESS;
}

static nvmlReturn_t take_gpm_sample(const struct visit *visit, nvmlGpmSample_t sample) {
  struct device *device = visit->device;
  if (device->gpm == GPM_OFF)
    return NVML_ERROR_NOT_SUPPORTED;
  if (device->gpm == GPM_NO_PERMISSION)
    return NVML_ERROR_NO_PERMISSION;
  sample->device = device;
  sample->read_ns = visit->t_ns;
  sample->refresh_ns = last_update_ns(visit->t_ns, device->gpm_period_ns, device->gpm_phase_ns);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t handle, nvmlGpmSample_t sample) {
  ENTER_DEVICE(nvmlGpmSampleGet, handle, sample);
  return visit.device->mig == MIG_ON ? NVML_ERROR_NOT_SUPPORTED : take_gpm_sample(&visit, sample);
}

SHIM_EXPORT nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t handle, unsigned instance, nvmlGpmSample_t sample) {
  ENTER_DEVICE(nvmlGpmMigSampleGet, handle, sample);
  (void)instance; /* every instance shows the activity of the whole GPU */
  return visit.device->mig == MIG_ON ? take_gpm_sample(&visit, sample) : NVML_ERROR_NOT_SUPPORTED;
}

/* Traffic is counted as it happens. Cycle counters move every 100 ms only: over shorter spans an H200 showed a steady
 * 100 % as 54 % at 50 ms and 20 % at 20 ms, which is the span over the refresh period. */
static double gpm_value(const struct device *device, unsigned metric, nvmlGpmSample_t first, nvmlGpmSample_t second) {
  struct pair level = device->gpm_metrics[metric];
  int64_t from_ns = first->read_ns, to_ns = second->read_ns;
  if (to_ns <= from_ns)
    return NAN;
  double scale = 1;
  if (gpm_metric_counts_cycles(metric)) {
    if (to_ns - from_ns < device->gpm_period_ns) {
      scale = (double)(to_ns - from_ns) / (double)device->gpm_period_ns;
    } else {
      from_ns = first->refresh_ns;
      to_ns = second->refresh_ns;
    }
  }
  return scale * level_integral(device, level, from_ns, to_ns) / ((double)(to_ns - from_ns) * 1e-9);
}

SHIM_EXPORT nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *get) {
  nvmlGpmSample_t first = get->sample1, second = get->sample2;
  if (first == NULL || second == NULL || first->device == NULL || first->device != second->device)
    return NVML_ERROR_INVALID_ARGUMENT;
  struct visit visit;
  double extra_us = 0;
  for (unsigned i = 0; i < get->numMetrics && i < GPM_METRIC_MAX; i++)
    if (get->metrics[i].metricId == GPM_GRAPHICS_UTIL)
      extra_us = scenario.graphics_latency_us;
  nvmlReturn_t code = gate_enter_gpu(CALL_nvmlGpmMetricsGet, first->device, extra_us, &visit);
  if (code != NVML_SUCCESS)
    return code;
  if (get->version != GPM_VERSION)
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  if (get->numMetrics > GPM_METRIC_MAX)
    return NVML_ERROR_INVALID_ARGUMENT;
  for (unsigned i = 0; i < get->numMetrics; i++) {
    nvmlGpmMetric_t *metric = &get->metrics[i];
    const nvmlGpmMetric_t *info = gpm_metric_info(metric->metricId);
    metric->nvmlReturn = info == NULL ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
    if (info == NULL)
      continue;
    metric->metricInfo = info->metricInfo;
    metric->value = gpm_value(first->device, metric->metricId, first, second);
    if (visit.garbage) /* an H200 gave NaN with a success code in 12 of 2,692 samples */
      metric->value = visit.has_value ? visit.value : NAN;
  }
  return NVML_SUCCESS;
}

/* ---- events ---- */

struct nvml_event_set {
  uint64_t mask[MAX_DEVICES];
  int64_t since_ns[MAX_DEVICES]; /* earlier events are gone for good, as with a real driver */
  bool delivered[MAX_EVENTS];
};

SHIM_EXPORT nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t handle, unsigned long long *types) {
  ENTER_DEVICE(nvmlDeviceGetSupportedEventTypes, handle, types);
  *types = EVENT_TYPE_XID | 0x1 | 0x2 | 0x10; /* Xid, single and double bit errors, clock changes */
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set) {
  ENTER(nvmlEventSetCreate);
  *set = calloc(1, sizeof **set);
  return *set == NULL ? NVML_ERROR_MEMORY : NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set) {
  ENTER(nvmlEventSetFree);
  free(set);
  return NVML_SUCCESS;
}

SHIM_EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t handle, unsigned long long types, nvmlEventSet_t set) {
  ENTER_DEVICE(nvmlDeviceRegisterEvents, handle, set);
  int gpu = visit.device->index;
  if (set->mask[gpu] == 0)
    set->since_ns[gpu] = visit.t_ns;
  set->mask[gpu] |= types;
  return NVML_SUCCESS;
}

/* Finds the first undelivered event that has happened. Returns when the next one will, or INT64_MAX. */
static int64_t next_event(const nvmlEventSet_t set, int64_t now_ns, int *found) {
  int64_t next_ns = INT64_MAX;
  *found = -1;
  int count = atomic_load(&scenario.event_count);
  for (int i = 0; i < count; i++) {
    const struct event *event = &scenario.events[i];
    if (set->delivered[i] || !(set->mask[event->gpu] & EVENT_TYPE_XID) || event->at_ns < set->since_ns[event->gpu])
      continue;
    if (event->at_ns < next_ns) {
      next_ns = event->at_ns;
      *found = event->at_ns <= now_ns ? i : -1;
    }
  }
  return next_ns;
}

static bool watches_lost_gpu(const nvmlEventSet_t set) {
  for (int gpu = 0; gpu < scenario.device_count; gpu++)
    if (set->mask[gpu] != 0 && gate_gpu_is_lost(&scenario.devices[gpu]))
      return true;
  return false;
}

static double monotonic_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

SHIM_EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *data, unsigned timeout_ms) {
  ENTER(nvmlEventSetWait_v2);
  if (set == NULL || data == NULL)
    return NVML_ERROR_INVALID_ARGUMENT;
  double end_ms = monotonic_ms() + timeout_ms;
  for (double wait_ms = 0;;) {
    int64_t now_ns = gate_wait_ms(wait_ms);
    int found;
    int64_t next_ns = next_event(set, now_ns, &found);
    if (found >= 0) {
      const struct event *event = &scenario.events[found];
      set->delivered[found] = true;
      *data = (nvmlEventData_t){.device = gate_current_handle(&scenario.devices[event->gpu]),
                                .eventType = EVENT_TYPE_XID,
                                .eventData = event->code,
                                .gpuInstanceId = NO_INSTANCE,
                                .computeInstanceId = NO_INSTANCE};
      return NVML_SUCCESS;
    }
    if (!gate_is_initialised())
      return NVML_ERROR_UNINITIALIZED;
    if (watches_lost_gpu(set))
      return NVML_ERROR_GPU_IS_LOST;
    double left_ms = end_ms - monotonic_ms();
    if (left_ms <= 0)
      return NVML_ERROR_TIMEOUT;
    if (clock_is_virtual()) { /* nothing can happen until the test moves the clock: one breath, then give up */
      if (wait_ms > 0)
        return NVML_ERROR_TIMEOUT;
      wait_ms = 1;
      continue;
    }
    /* Short slices only where something can appear unannounced, so that waiting costs a benchmark nothing. */
    wait_ms = scenario.control_path[0] != 0 && left_ms > 50 ? 50 : left_ms;
    if (next_ns != INT64_MAX && (double)(next_ns - now_ns) * 1e-6 < wait_ms)
      wait_ms = (double)(next_ns - now_ns) * 1e-6;
    if (wait_ms < 0.1)
      wait_ms = 0.1;
  }
}
