# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CUDA's libraries, which compute nothing; ONNX Runtime's CUDA provider starts on them.

The provider assigns nodes by its real kernels, allocates, copies and launches; kernels do nothing, so numbers
mean nothing. Tests ask which nodes it takes and what it copies. Needs gcc, nm and an unpacked onnxruntime-gpu:

pip install --no-deps --target SITE onnxruntime-gpu && PGX_ORT_GPU=SITE pytest -m nightly tests/runners/test_ort_cuda_provider.py
"""

import re
import subprocess
from pathlib import Path

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
CUDA_SYMBOL = re.compile(r"(__cuda|cuda|cu[A-Z]|cublas|curand)\w*")
# As in cuda_runtime_api.h. cudaDeviceProp: totalGlobalMem at 288, maxThreadsPerBlock at 320, major and
# minor at 360 and 364, multiProcessorCount at 384.
RUNTIME = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int tell(const char *what, size_t n) { if (getenv("STAND_IN_LOG")) fprintf(stderr, "%s %zu\n", what, n); return 0; }
static const char *KINDS[] = {"host to host", "host to device", "device to host", "device to device", "default"};
int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(256, n ? (n + 255) / 256 * 256 : 256); memset(*p, 0, n); return 0; }
int cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
int cudaMallocFromPoolAsync(void **p, size_t n, void *pool, void *s) { return cudaMalloc(p, n); }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaFreeAsync(void *p, void *s) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int k) { memmove(d, s, n); return tell(KINDS[k], n); }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *stream) { return cudaMemcpy(d, s, n, k); }
int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(void *d, int v, size_t n, void *s) { return cudaMemset(d, v, n); }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = (size_t)1 << 34; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13020; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaStreamCreate(void **s) { *s = (void *)16; return 0; }
int cudaStreamCreateWithFlags(void **s, unsigned f) { *s = (void *)16; return 0; }
int cudaStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
int cudaEventCreate(void **e) { *e = (void *)32; return 0; }
int cudaEventCreateWithFlags(void **e, unsigned f) { *e = (void *)32; return 0; }
int cudaPointerGetAttributes(int *a, const void *p) { memset(a, 0, 32); a[0] = 2; return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : 1024; return 0; }
const char *cudaGetErrorString(int e) { return "none"; }
const char *cudaGetErrorName(int e) { return "none"; }
int cudaGetDeviceProperties(char *p, int d) {
  memset(p, 0, 512); strcpy(p, "stand-in"); *(size_t *)(p + 288) = (size_t)1 << 34; *(size_t *)(p + 296) = 49152;
  *(int *)(p + 304) = 65536; *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; *(int *)(p + 360) = 8; *(int *)(p + 364) = 9; *(int *)(p + 384) = 46;
  return 0;
}
void **__cudaRegisterFatBinary(void *p) { static void *x; return &x; }
"""
DRIVER = r"""
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *p, int n, int d) { strcpy(p, "stand-in"); return 0; }
int cuDeviceTotalMem_v2(unsigned long *m, int d) { *m = 1ul << 34; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : 0; return 0; }
"""
HANDLE = "#include <stdlib.h>\nint {0}(void **h) {{ *h = calloc(1, 4096); return 0; }}\n"
NOTHING = "int {0}(void) {{ return 0; }}\n"


def build(site: Path, folder: Path) -> Path:
    """Compile the libraries into a folder for LD_LIBRARY_PATH."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", site / PROVIDER], capture_output=True, text=True, check=True).stdout
    wanted = {name.partition("@")[0] for name in re.findall(r" U (\S+)", listed)}
    rest = sorted(name for name in wanted if CUDA_SYMBOL.fullmatch(name) and not re.search(rf"\b{name}\(", RUNTIME))
    runtime = RUNTIME + "".join(
        (HANDLE if name.startswith("cublas") and "Create" in name else NOTHING).format(name) for name in rest
    )
    _compile(folder, "libcudart.so.13", runtime)
    _compile(folder, "libcuda.so.1", DRIVER)
    calls = sorted(set(re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", (site / PROVIDER).read_bytes())))
    cudnn = [(HANDLE if b"Create" in name else NOTHING).format(name.decode()) for name in calls]
    _compile(folder, "libcudnn.so.9", "".join(cudnn))
    for name in ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"):  # their symbols are in the first
        _compile(folder, name, "")
    return folder


def _compile(folder: Path, name: str, source: str) -> None:
    command = ["gcc", "-w", "-x", "c", "-shared", "-fPIC", "-o", folder / name, f"-Wl,-soname,{name}", "-"]
    subprocess.run(command, input=source, text=True, check=True)
