/* The part of NVML's binary interface that this test double speaks.
 *
 * Names, numbers and layouts are facts of NVIDIA's published API; each layout is asserted here against the
 * offsets of a real driver's binding and once more, from the Python side, against pynvml's ctypes structs. */
#ifndef NVML_ABI_H
#define NVML_ABI_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

typedef int nvmlReturn_t;
typedef struct nvml_handle *nvmlDevice_t;
typedef struct nvml_gpm_sample *nvmlGpmSample_t;
typedef struct nvml_event_set *nvmlEventSet_t;

enum {
  NVML_SUCCESS = 0,
  NVML_ERROR_UNINITIALIZED = 1,
  NVML_ERROR_INVALID_ARGUMENT = 2,
  NVML_ERROR_NOT_SUPPORTED = 3,
  NVML_ERROR_NO_PERMISSION = 4,
  NVML_ERROR_NOT_FOUND = 6,
  NVML_ERROR_INSUFFICIENT_SIZE = 7,
  NVML_ERROR_DRIVER_NOT_LOADED = 9,
  NVML_ERROR_TIMEOUT = 10,
  NVML_ERROR_LIBRARY_NOT_FOUND = 12,
  NVML_ERROR_FUNCTION_NOT_FOUND = 13,
  NVML_ERROR_GPU_IS_LOST = 15,
  NVML_ERROR_RESET_REQUIRED = 16,
  NVML_ERROR_OPERATING_SYSTEM = 17,
  NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
  NVML_ERROR_MEMORY = 20,
  NVML_ERROR_NO_DATA = 21,
  NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
  NVML_ERROR_DEPRECATED = 26,
  NVML_ERROR_NOT_READY = 27,
  NVML_ERROR_GPU_NOT_FOUND = 28,
  NVML_ERROR_UNKNOWN = 999,
};

enum {
  VALUE_DOUBLE = 0,
  VALUE_UNSIGNED_INT = 1,
  VALUE_UNSIGNED_LONG = 2,
  VALUE_UNSIGNED_LONG_LONG = 3,
  VALUE_SIGNED_LONG_LONG = 4,
  VALUE_SIGNED_INT = 5,
};

enum {
  SAMPLES_TOTAL_POWER = 0,
  SAMPLES_GPU_UTIL = 1,
  SAMPLES_MEMORY_UTIL = 2,
  SAMPLES_MODULE_POWER = 7,
  SAMPLES_TYPES = 10,
};
enum { CLOCK_GRAPHICS = 0, CLOCK_SM = 1, CLOCK_MEMORY = 2, CLOCK_VIDEO = 3 };
enum { SCOPE_GPU = 0, SCOPE_MODULE = 1, SCOPE_MEMORY = 2 };

#define GPM_METRIC_MAX 477
#define GPM_GRAPHICS_UTIL 1u
#define EVENT_TYPE_XID 0x8ULL
#define MEMORY_V2_VERSION 0x02000028u
#define TEMPERATURE_V1_VERSION 0x0100000Cu
#define PROCESSES_UTILIZATION_V1_VERSION 0x01000018u
#define GPM_VERSION 1u
#define NO_INSTANCE 0xFFFFFFFFu

typedef union {
  double dVal;
  unsigned int uiVal;
  unsigned long ulVal;
  unsigned long long ullVal;
  signed long long sllVal;
  int siVal;
  unsigned short usVal;
} nvmlValue_t;

typedef struct {
  uint32_t fieldId;
  uint32_t scopeId;
  int64_t timestamp;   /* us, wall clock */
  int64_t latencyUsec; /* what the driver spent on this value */
  int32_t valueType;
  int32_t nvmlReturn;
  nvmlValue_t value;
} nvmlFieldValue_t;

typedef struct {
  uint64_t timeStamp; /* us, wall clock */
  nvmlValue_t sampleValue;
} nvmlSample_t;

typedef struct {
  uint32_t gpu, memory; /* percent */
} nvmlUtilization_t;

typedef struct {
  uint64_t total, free, used; /* bytes */
} nvmlMemory_t;

typedef struct {
  uint32_t version;
  uint64_t total, reserved, free, used; /* bytes */
} nvmlMemory_v2_t;

typedef struct {
  uint32_t metricId;
  int32_t nvmlReturn;
  double value;
  struct {
    const char *shortName, *longName, *unit;
  } metricInfo;
} nvmlGpmMetric_t;

typedef struct {
  uint32_t version, numMetrics;
  nvmlGpmSample_t sample1, sample2;
  nvmlGpmMetric_t metrics[GPM_METRIC_MAX];
} nvmlGpmMetricsGet_t;

typedef struct {
  uint32_t version, isSupportedDevice;
} nvmlGpmSupport_t;

typedef struct {
  uint32_t pid;
  uint64_t usedGpuMemory; /* bytes */
  uint32_t gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

typedef struct {
  uint32_t pid;
  uint64_t timeStamp;
  uint32_t smUtil, memUtil, encUtil, decUtil;
} nvmlProcessUtilizationSample_t;

typedef struct {
  uint64_t timeStamp;
  uint32_t pid, smUtil, memUtil, encUtil, decUtil, jpgUtil, ofaUtil;
} nvmlProcessUtilizationInfo_v1_t;

typedef struct {
  uint32_t version, processSamplesCount;
  uint64_t lastSeenTimeStamp;
  nvmlProcessUtilizationInfo_v1_t *procUtilArray;
} nvmlProcessesUtilizationInfo_v1_t;

typedef struct {
  char busIdLegacy[16];
  uint32_t domain, bus, device, pciDeviceId, pciSubSystemId;
  char busId[32];
} nvmlPciInfo_t;

typedef struct {
  nvmlDevice_t device;
  uint64_t eventType, eventData;
  uint32_t gpuInstanceId, computeInstanceId;
} nvmlEventData_t;

typedef struct {
  uint32_t version, sensorType;
  int32_t temperature;
} nvmlTemperature_v1_t;

typedef struct {
  uint64_t referenceTime; /* us */
  uint64_t violationTime; /* ns */
} nvmlViolationTime_t;

#define ASSERT_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " has the driver's size")
#define ASSERT_OFFSET(type, field, at) static_assert(offsetof(type, field) == (at), #type "." #field " is in place")

ASSERT_SIZE(nvmlValue_t, 8);
ASSERT_SIZE(nvmlFieldValue_t, 40);
ASSERT_OFFSET(nvmlFieldValue_t, timestamp, 8);
ASSERT_OFFSET(nvmlFieldValue_t, latencyUsec, 16);
ASSERT_OFFSET(nvmlFieldValue_t, valueType, 24);
ASSERT_OFFSET(nvmlFieldValue_t, nvmlReturn, 28);
ASSERT_OFFSET(nvmlFieldValue_t, value, 32);
ASSERT_SIZE(nvmlSample_t, 16);
ASSERT_OFFSET(nvmlSample_t, sampleValue, 8);
ASSERT_SIZE(nvmlUtilization_t, 8);
ASSERT_SIZE(nvmlMemory_t, 24);
ASSERT_SIZE(nvmlMemory_v2_t, 40);
ASSERT_OFFSET(nvmlMemory_v2_t, total, 8);
ASSERT_OFFSET(nvmlMemory_v2_t, free, 24);
ASSERT_OFFSET(nvmlMemory_v2_t, used, 32);
ASSERT_SIZE(nvmlGpmMetric_t, 40);
ASSERT_OFFSET(nvmlGpmMetric_t, value, 8);
ASSERT_OFFSET(nvmlGpmMetric_t, metricInfo, 16);
ASSERT_SIZE(nvmlGpmMetricsGet_t, 19104);
ASSERT_OFFSET(nvmlGpmMetricsGet_t, sample1, 8);
ASSERT_OFFSET(nvmlGpmMetricsGet_t, sample2, 16);
ASSERT_OFFSET(nvmlGpmMetricsGet_t, metrics, 24);
ASSERT_SIZE(nvmlGpmSupport_t, 8);
ASSERT_SIZE(nvmlProcessInfo_t, 24);
ASSERT_OFFSET(nvmlProcessInfo_t, usedGpuMemory, 8);
ASSERT_OFFSET(nvmlProcessInfo_t, gpuInstanceId, 16);
ASSERT_SIZE(nvmlProcessUtilizationSample_t, 32);
ASSERT_OFFSET(nvmlProcessUtilizationSample_t, timeStamp, 8);
ASSERT_OFFSET(nvmlProcessUtilizationSample_t, smUtil, 16);
ASSERT_SIZE(nvmlProcessUtilizationInfo_v1_t, 40);
ASSERT_OFFSET(nvmlProcessUtilizationInfo_v1_t, pid, 8);
ASSERT_OFFSET(nvmlProcessUtilizationInfo_v1_t, ofaUtil, 32);
ASSERT_SIZE(nvmlProcessesUtilizationInfo_v1_t, 24);
ASSERT_OFFSET(nvmlProcessesUtilizationInfo_v1_t, procUtilArray, 16);
ASSERT_SIZE(nvmlPciInfo_t, 68);
ASSERT_OFFSET(nvmlPciInfo_t, busId, 36);
ASSERT_SIZE(nvmlEventData_t, 32);
ASSERT_OFFSET(nvmlEventData_t, gpuInstanceId, 24);
ASSERT_SIZE(nvmlTemperature_v1_t, 12);
ASSERT_OFFSET(nvmlTemperature_v1_t, temperature, 8);
ASSERT_SIZE(nvmlViolationTime_t, 16);

#endif
