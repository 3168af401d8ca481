/* The model behind the test double: what a scenario describes, and what the modules share.
 *
 *   truth.c     power and activity as exact functions of time
 *   profiles.c  what each GPU family can do
 *   scenario.c  the text language, and the control file
 *   sensors.c   how a driver would report the truth: rings, windows, ticks
 *   gate.c      the way into every call: clock, counting, faults, latency
 *   nvml_shim.c the exported NVML functions
 *   control.c   the exported shim_* functions that a test drives
 *
 * Nothing runs in the background. A call at time t evaluates the model at the last sensor update not after t. */
#ifndef SHIM_H
#define SHIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

#include "nvml_abi.h"
#include "truth.h"

#define SHIM_EXPORT __attribute__((visibility("default")))
#define SHIM_VARIABLE "JOULETRACE_NVML_SHIM"

#define MAX_DEVICES 16
#define MAX_PROCESSES 64
#define MAX_FAULTS 256
#define MAX_EVENTS 256
#define MAX_RESETS 16
#define MAX_FIELD_ID 320
#define MAX_FIELD_FAULTS 8

#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S INT64_C(1000000000)

/* Every call that a fault or a latency can name. */
#define SHIM_CALLS(X)                                                                                                  \
  X(nvmlInit) X(nvmlInit_v2) X(nvmlInitWithFlags) X(nvmlShutdown)                                                      \
  X(nvmlSystemGetDriverVersion) X(nvmlSystemGetNVMLVersion) X(nvmlSystemGetCudaDriverVersion)                          \
  X(nvmlSystemGetCudaDriverVersion_v2) X(nvmlSystemGetProcessName)                                                     \
  X(nvmlDeviceGetCount_v2) X(nvmlDeviceGetHandleByIndex_v2) X(nvmlDeviceGetHandleByUUID)                               \
  X(nvmlDeviceGetHandleByPciBusId_v2)                                                                                  \
  X(nvmlDeviceGetUUID) X(nvmlDeviceGetName) X(nvmlDeviceGetSerial) X(nvmlDeviceGetIndex) X(nvmlDeviceGetMinorNumber)   \
  X(nvmlDeviceGetBrand) X(nvmlDeviceGetPciInfo_v3) X(nvmlDeviceGetArchitecture) X(nvmlDeviceGetCudaComputeCapability)  \
  X(nvmlDeviceGetNumGpuCores) X(nvmlDeviceGetMemoryBusWidth) X(nvmlDeviceGetMigMode) X(nvmlDeviceGetPersistenceMode)   \
  X(nvmlDeviceGetPowerUsage) X(nvmlDeviceGetEnforcedPowerLimit) X(nvmlDeviceGetPowerManagementMode)                    \
  X(nvmlDeviceGetPowerManagementLimit) X(nvmlDeviceGetPowerManagementDefaultLimit)                                     \
  X(nvmlDeviceGetPowerManagementLimitConstraints) X(nvmlDeviceGetTotalEnergyConsumption)                               \
  X(nvmlDeviceGetFieldValues) X(nvmlDeviceGetSamples) X(nvmlDeviceGetUtilizationRates)                                 \
  X(nvmlDeviceGetMemoryInfo) X(nvmlDeviceGetMemoryInfo_v2) X(nvmlDeviceGetClockInfo) X(nvmlDeviceGetMaxClockInfo)      \
  X(nvmlDeviceGetPerformanceState) X(nvmlDeviceGetCurrentClocksEventReasons)                                           \
  X(nvmlDeviceGetCurrentClocksThrottleReasons) X(nvmlDeviceGetViolationStatus)                                         \
  X(nvmlDeviceGetTemperature) X(nvmlDeviceGetTemperatureV)                                                             \
  X(nvmlDeviceGetTotalEccErrors) X(nvmlDeviceGetMemoryErrorCounter) X(nvmlDeviceGetRemappedRows)                       \
  X(nvmlDeviceGetComputeRunningProcesses_v3) X(nvmlDeviceGetMPSComputeRunningProcesses_v3)                             \
  X(nvmlDeviceGetGraphicsRunningProcesses_v3) X(nvmlDeviceGetProcessUtilization)                                       \
  X(nvmlDeviceGetProcessesUtilizationInfo) X(nvmlDeviceGetPcieThroughput)                                              \
  X(nvmlDeviceIsMigDeviceHandle) X(nvmlDeviceGetGpuInstanceId) X(nvmlDeviceGetComputeInstanceId)                       \
  X(nvmlDeviceGetMaxMigDeviceCount) X(nvmlDeviceGetMigDeviceHandleByIndex) X(nvmlDeviceGetFanSpeed)                    \
  X(nvmlDeviceGetSupportedEventTypes) X(nvmlDeviceRegisterEvents)                                                      \
  X(nvmlEventSetCreate) X(nvmlEventSetFree) X(nvmlEventSetWait_v2)                                                     \
  X(nvmlGpmQueryDeviceSupport) X(nvmlGpmSampleAlloc) X(nvmlGpmSampleFree) X(nvmlGpmSampleGet)                          \
  X(nvmlGpmMigSampleGet) X(nvmlGpmMetricsGet)

#define SHIM_CALL_ID(name) CALL_##name,
enum call_id { SHIM_CALLS(SHIM_CALL_ID) CALL_COUNT, CALL_ANY = -1, CALL_NONE = -2 };

enum call_id call_by_name(const char *name); /* CALL_NONE when there is no such call */

/* ---- the model ---- */

/* A level that may differ between the active and the inactive phase of the power function. */
struct pair {
  double on, off;
};

/* A power sensor: every `period_ns` it shows the mean over `window_ns` that ended `lag_ns` before. Period 0: none. */
struct sensor {
  int64_t period_ns, window_ns, lag_ns, phase_ns;
};

/* A driver's ring of means over its own intervals. Depth 0: none. */
struct ring {
  int depth;
  int64_t period_ns, phase_ns;
  bool jitter;
};

enum power_usage { USAGE_NONE, USAGE_AVERAGE, USAGE_INSTANT };
enum gpm_support { GPM_OFF, GPM_ON, GPM_NO_PERMISSION };
enum mig_mode { MIG_UNSUPPORTED, MIG_OFF, MIG_ON };

enum throttle {
  THROTTLE_SW_POWER_CAP,
  THROTTLE_SW_THERMAL,
  THROTTLE_HW_THERMAL,
  THROTTLE_HW_POWER_BRAKE,
  THROTTLE_SYNC_BOOST,
  THROTTLE_BOARD_LIMIT,
  THROTTLE_LOW_UTILIZATION,
  THROTTLE_RELIABILITY,
  THROTTLE_BASE_CLOCKS,
  THROTTLE_COUNT,
};

struct process {
  uint32_t pid;
  double memory_mib;
  int64_t from_ns, to_ns;
  struct pair sm_percent;
};

struct device {
  int index;
  uint64_t seed;
  char uuid[80], name[96];
  unsigned architecture, compute_major, compute_minor, cores, bus_width_bits, memory_mib;
  unsigned limit_min_mw, limit_max_mw, limit_default_mw, limit_mw;
  bool has_remapped_rows, has_memory_temperature, has_nvlink;

  struct truth truth;
  double gain, offset_w;      /* of every power sensor: reading = gain * truth + offset */
  double counter_gain;        /* of the energy counter */
  double counter_start_mj;    /* its value at the epoch */
  unsigned quantum_mw;        /* readings are multiples of this */
  struct pair memory_w;       /* memory-scope average; 0 = unsupported */

  struct sensor instant, average;
  enum power_usage power_usage;
  bool power_fields;          /* fields 185 and 186 */
  int64_t counter_period_ns, counter_phase_ns; /* period 0: no counter */
  int64_t resets_ns[MAX_RESETS];
  atomic_int reset_count;
  struct ring power_ring, utilization_ring;

  enum gpm_support gpm;
  int64_t gpm_period_ns, gpm_phase_ns;
  enum mig_mode mig;
  struct pair gpm_metrics[GPM_METRIC_MAX];

  struct pair utilization, memory_utilization; /* percent */
  struct pair sm_mhz, memory_mhz;
  unsigned max_sm_mhz, max_memory_mhz;
  struct pair temperature_c, memory_temperature_c, memory_used_mib; /* memory_used_mib < 0: from the processes */
  struct pair pstate;
  bool persistence;
  struct pair throttle[THROTTLE_COUNT]; /* share of the time, 0 to 1 */

  uint64_t ecc_volatile[2], ecc_aggregate[2]; /* single bit, double bit */
  uint32_t remapped_correctable, remapped_uncorrectable, remap_pending, remap_failed, recovery_action;

  struct process processes[MAX_PROCESSES];
  int process_count;
};

enum fault_kind { FAULT_CODE, FAULT_HANG, FAULT_LATENCY, FAULT_GARBAGE, FAULT_LOST, FAULT_MISMATCH };

struct fault {
  enum fault_kind kind;
  enum call_id call; /* CALL_ANY: all of them */
  int gpu;           /* -1: all, and calls without a device */
  int64_t from_ns, to_ns;
  uint64_t from_call, to_call, every;
  int code;
  double latency_us;
  bool burn, same_handle;
  int field; /* nvmlDeviceGetFieldValues: only this field; -1 = the call itself */
  bool has_value;
  double value;
};

struct fault_list {
  struct fault faults[MAX_FAULTS];
  int count;
};

struct event {
  int gpu;
  int64_t at_ns;
  uint64_t code;
};

struct latency {
  double us;
  bool sleep; /* else: burn CPU */
};

struct scenario {
  bool has_epoch;
  int64_t epoch_ns;
  uint64_t seed;
  char driver_version[64], nvml_version[64];
  int cuda_version;
  char control_path[512];
  struct device devices[MAX_DEVICES];
  int device_count;
  struct fault_list faults;
  struct event events[MAX_EVENTS];
  atomic_int event_count;
  struct latency latency[CALL_COUNT];
  double field_latency_us[MAX_FIELD_ID]; /* added to a batch that holds the field */
  double graphics_latency_us;            /* added when GPM's GRAPHICS_UTIL is computed */
};

extern struct scenario scenario;

/* ---- profiles.c ---- */
bool profile_apply(struct device *device, const char *name);
extern const char *const profile_names;
extern const char *const throttle_names[THROTTLE_COUNT];
int gpm_metric_by_name(const char *name); /* -1 when there is none */
bool gpm_metric_counts_cycles(unsigned metric);
const nvmlGpmMetric_t *gpm_metric_info(unsigned metric);

/* ---- scenario.c ---- */
/* Reads a scenario into `scenario`. False: one sentence was printed to stderr. */
bool scenario_load(const char *path);
/* Reads a control file; its times count from `now_ns`. Faults go to `faults`, events and counter resets into the
 * scenario for good. False: one sentence was printed, nothing was taken over. */
bool control_load(const char *path, int64_t now_ns, struct fault_list *faults);
void scenario_free(void);
uint64_t hash64(uint64_t seed, uint64_t stream, uint64_t index);

/* ---- sensors.c: `t_ns` counts from the epoch ---- */
unsigned sensor_instant_mw(const struct device *device, int64_t t_ns);
unsigned sensor_average_mw(const struct device *device, int64_t t_ns);
unsigned sensor_memory_mw(const struct device *device, int64_t t_ns);
uint64_t sensor_energy_mj(const struct device *device, int64_t t_ns);
/* Fills up to `capacity` samples newer than `since_us`, oldest first; returns how many, or -1: no such ring. */
int sensor_ring(const struct device *device, int type, int64_t t_ns, uint64_t since_us, nvmlSample_t *samples,
                int capacity);
int sensor_ring_depth(const struct device *device, int type); /* 0: no such ring */
/* Mean utilization over the last finished interval of the utilization ring, percent. */
void sensor_utilization(const struct device *device, int64_t t_ns, nvmlUtilization_t *utilization);
int64_t sensor_utilization_slot_ns(const struct device *device, int64_t t_ns); /* end of that interval */
double level_at(const struct device *device, struct pair level, int64_t t_ns);
/* Integral of a level over (from_ns, to_ns], level times seconds. */
double level_integral(const struct device *device, struct pair level, int64_t from_ns, int64_t to_ns);
int64_t last_update_ns(int64_t t_ns, int64_t period_ns, int64_t phase_ns);

/* ---- gate.c ---- */
struct nvml_handle {
  struct device *device;
  int64_t born_ns;
  uint64_t born_sequence;
};

struct field_fault {
  int field, code;
  bool garbage, has_value;
  double value;
};

/* What a call gets to know on its way in. */
struct visit {
  struct device *device;
  int64_t t_ns;      /* since the epoch */
  double burn_us, sleep_us; /* what the call is made to cost */
  bool garbage, has_value;
  double value;
  struct field_fault field_faults[MAX_FIELD_FAULTS];
  int field_fault_count;
};

/* The gate counts the call, applies faults and latency, and tells the time. Anything but NVML_SUCCESS is the call's
 * result. `extra_us` is latency that depends on the arguments. */
nvmlReturn_t gate_enter(enum call_id call, struct visit *visit);
nvmlReturn_t gate_enter_device(enum call_id call, nvmlDevice_t handle, double extra_us, struct visit *visit);
/* For a call that knows its GPU from something other than a handle. */
nvmlReturn_t gate_enter_gpu(enum call_id call, struct device *device, double extra_us, struct visit *visit);
/* A handle lookup: gives out a fresh handle when the GPU was lost since the last one. */
nvmlReturn_t gate_enter_lookup(enum call_id call, struct device *device, nvmlDevice_t *handle);
/* A call whose latency is up to the caller: pays what the scenario says it costs. */
void gate_pay(const struct visit *visit);

nvmlReturn_t gate_initialise(enum call_id call);
nvmlReturn_t gate_shutdown(void);
bool gate_is_initialised(void);
void gate_reset(void);
void gate_poll_control(void);
uint64_t gate_call_count(enum call_id call, int gpu);

/* The current handle of a GPU, for an event. */
nvmlDevice_t gate_current_handle(struct device *device);
bool gate_gpu_is_lost(const struct device *device);
/* Sleeps until the clock or the faults may have changed, at most `ms`; returns the time since the epoch. */
int64_t gate_wait_ms(double ms);
/* Time since the epoch; the scenario's epoch itself. */
int64_t gate_now_ns(void);
int64_t gate_epoch_ns(void);

/* Time since the Unix epoch that the model runs on. */
int64_t clock_now_ns(void);
void clock_set_ns(int64_t now_ns);
void clock_advance_ns(int64_t delta_ns);
void clock_use_real_time(void);
void clock_step_ns(int64_t delta_ns);
bool clock_is_virtual(void);
/* The driver's own time stamp for an instant of the model, us since the Unix epoch: shifted by every clock step that
 * had happened by then. */
uint64_t clock_stamp_us(int64_t t_ns);
bool clock_was_stepped(void);

#endif
