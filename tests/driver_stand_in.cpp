// SPDX-License-Identifier: Apache-2.0
// The few functions of the CUDA driver that torch_utils/kernels/driver.py calls, as strict as the driver is about
// contexts and captures, for machines without a GPU. Launches are recorded instead of run.
#include <cstdint>
#include <cstring>

struct Module { void* context; };
struct Launch { void* function; unsigned geometry[7]; void* stream; uint64_t words[16]; };

namespace {
constexpr int kDevices = 2, kMaxLaunches = 64;
thread_local void* current = nullptr;
thread_local int capture_mode = 0;
Module modules[kMaxLaunches];
int num_modules = 0;
char contexts[kDevices];
}

extern "C" {
Launch launches[kMaxLaunches];
int num_launches = 0, num_words = 0, is_capturing = 0, launch_status = 0, init_status = 0;

int cuInit(unsigned) { return init_status; }

int cuGetErrorName(int status, const char** name) {
    *name = status == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : status == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        : status == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
    return *name ? 0 : 1;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal + 5;
    return ordinal < kDevices ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device - 5];
    return 0;
}

int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }

int cuThreadExchangeStreamCaptureMode(int* mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

int cuModuleLoadData(void** module, const void* code) {
    if (!current) return 201;
    if (is_capturing && capture_mode != 2) return 900;
    if (std::strcmp(static_cast<const char*>(code), "cubin")) return 200;
    modules[num_modules].context = current;
    *module = &modules[num_modules++];
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = module;
    return std::strcmp(name, "f") ? 500 : 0;
}

int cuFuncGetAttribute(int* value, int attribute, void*) {
    *value = attribute == 4 ? 42 : 0;
    return 0;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    if (current != static_cast<Module*>(function)->context) return 201;
    if (launch_status || extra) return launch_status ? launch_status : 1;
    Launch launch = {function, {gx, gy, gz, bx, by, bz, shared}, stream, {}};
    for (int i = 0; i < num_words; ++i) std::memcpy(&launch.words[i], params[i], 8);
    launches[num_launches++ % kMaxLaunches] = launch;
    return 0;
}
}
