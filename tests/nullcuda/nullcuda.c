/* A GPU that computes nothing, and that PyTorch's CUDA build takes for a real one.

   Preloaded, this library answers what PyTorch asks of the CUDA runtime, the driver and cuBLAS.
   Device memory is host memory that begins as zeros. Copies, memsets and plain fills are made; no
   other kernel and no matrix product is, so that their outputs stay zero.

   Only calls that return more than an error code are written here. launch.py adds all others that
   PyTorch links to: they do nothing, and succeed. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define CUDA __attribute__((visibility("default"))) cudaError_t
#define OTHER(type) __attribute__((visibility("default"))) type

static const char NAME[] = "Null device";
static const int MAJOR = 8, MINOR = 0, PROCESSORS = 108, CUDA_VERSION = 13000;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* What the tests see: counters, a log, and copies that arrive late. ------------------------------ */

enum { LAUNCHES, WAITS, H2D, D2H, D2D, MEMSETS, COUNTERS };
static atomic_long counters[COUNTERS];
static atomic_int lazy;
static FILE *out;

OTHER(long) nullcuda_count(int which) { return counters[which]; }

OTHER(void) nullcuda_log(const char *path) /* NULL ends the log */
{
    pthread_mutex_lock(&lock);
    if (out) fclose(out);
    out = path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

/* A line of the log: what happened, on which stream, and details. */
__attribute__((format(printf, 3, 4)))
static void note(const char *what, int stream, const char *details, ...)
{
    if (!out) return;
    va_list list;
    va_start(list, details);
    pthread_mutex_lock(&lock);
    if (out) {
        fprintf(out, "%s %d ", what, stream);
        vfprintf(out, details, list);
        fputc('\n', out);
    }
    pthread_mutex_unlock(&lock);
    va_end(list);
}

OTHER(void) nullcuda_mark(const char *text) { note("mark", 0, "%s", text); }

/* Memory: two ranges of addresses, so that an address tells what it is. No page is used twice. --- */

typedef struct { char *start; atomic_size_t used, held; size_t limit; } Range;
static const size_t SPAN = (size_t)1 << 40, PAGE = 4096, HEADER = 512;
static Range ranges[] = {{.limit = (size_t)16 << 30}, {.limit = (size_t)1 << 40}}; /* bytes */
static Range *const device = &ranges[0], *const pinned = &ranges[1];

__attribute__((constructor)) static void reserve(void)
{
    for (int i = 0; i < 2; i++) /* only what is written to takes memory */
        ranges[i].start = mmap(NULL, SPAN, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static Range *range_of(const void *at)
{
    for (int i = 0; i < 2; i++) {
        char *start = ranges[i].start;
        if ((char *)at >= start && (char *)at < start + ranges[i].used) return &ranges[i];
    }
    return NULL; /* pageable */
}

static size_t with_header(size_t size) { return (size + HEADER + PAGE - 1) & ~(PAGE - 1); }

static cudaError_t take(Range *range, void **at, size_t size)
{
    *at = NULL;
    if (!size) return cudaSuccess;
    if (range->held + size > range->limit) return cudaErrorMemoryAllocation;
    if (range->start == MAP_FAILED || range->used + with_header(size) > SPAN)
        return cudaErrorMemoryAllocation;
    char *block = range->start + atomic_fetch_add(&range->used, with_header(size));
    *(size_t *)block = size;
    range->held += size;
    *at = block + HEADER;
    return cudaSuccess;
}

static cudaError_t give(void *at)
{
    Range *range = range_of(at);
    if (!range) return cudaSuccess;
    char *block = (char *)at - HEADER;
    size_t size = *(size_t *)block;
    range->held -= size;
    madvise(block, with_header(size), MADV_DONTNEED);
    return cudaSuccess;
}

CUDA cudaMalloc(void **at, size_t size) { return take(device, at, size); }
CUDA cudaHostAlloc(void **at, size_t size, unsigned flags) { return take(pinned, at, size); }
CUDA cudaFree(void *at) { return give(at); }
CUDA cudaFreeHost(void *at) { return give(at); }

CUDA cudaMemGetInfo(size_t *free, size_t *total)
{
    *total = device->limit;
    *free = device->limit - device->held;
    return cudaSuccess;
}

CUDA cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at)
{
    Range *range = range_of(at);
    memset(a, 0, sizeof *a);
    a->type = !range ? cudaMemoryTypeUnregistered
              : range == device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    a->device = range ? 0 : cudaInvalidDeviceId;
    a->devicePointer = range ? (void *)at : NULL;
    a->hostPointer = range == device ? NULL : (void *)at;
    return cudaSuccess;
}

/* Streams and events. Everything is done when it is asked for, but for late copies. -------------- */

typedef struct { int number, priority; } Stream;
static atomic_int streams;
static const Stream DEFAULT = {0, 0};

/* The default streams are not pointers: 0, 1 and 2. */
static const Stream *stream_of(cudaStream_t s) { return (size_t)s < 8 ? &DEFAULT : (Stream *)s; }
static int number_of(cudaStream_t s) { return stream_of(s)->number; }

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6; /* milliseconds */
}

typedef struct { void *to, *bytes; size_t size; } Late;
static Late *late;
static int n_late;

OTHER(void) nullcuda_lazy(int on) { lazy = on; }

static void put_off(void *to, const void *from, size_t size)
{
    Late copy = {to, memcpy(malloc(size), from, size), size};
    pthread_mutex_lock(&lock);
    late = realloc(late, (n_late + 1) * sizeof *late);
    late[n_late++] = copy;
    pthread_mutex_unlock(&lock);
}

static cudaError_t settle(void) /* all late copies arrive, whatever their stream */
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_late; i++) {
        memcpy(late[i].to, late[i].bytes, late[i].size);
        free(late[i].bytes);
    }
    n_late = 0;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static cudaError_t wait_for(const char *what, int stream)
{
    counters[WAITS]++;
    note("wait", stream, "%s", what);
    return settle();
}

CUDA cudaDeviceSynchronize(void) { return wait_for("device", 0); }
CUDA cudaStreamSynchronize(cudaStream_t s) { return wait_for("stream", number_of(s)); }
CUDA cudaEventSynchronize(cudaEvent_t e) { return wait_for("event", 0); }
CUDA cudaStreamQuery(cudaStream_t s) { return settle(); }
CUDA cudaEventQuery(cudaEvent_t e) { return settle(); }

CUDA cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority)
{
    Stream *made = malloc(sizeof *made);
    *made = (Stream){++streams, priority};
    *s = (cudaStream_t)made;
    return cudaSuccess;
}

CUDA cudaStreamGetPriority(cudaStream_t s, int *priority)
{
    *priority = stream_of(s)->priority;
    return cudaSuccess;
}

CUDA cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags)
{
    note("join", number_of(s), "%p", (void *)e);
    return cudaSuccess;
}

CUDA cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

CUDA cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                              unsigned long long *id, cudaGraph_t *graph,
                              const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                              size_t *count)
{
    if (id) *id = 0;
    if (count) *count = 0;
    return cudaStreamIsCapturing(s, status);
}

CUDA cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags)
{
    settle();
    f(s, cudaSuccess, data);
    return cudaSuccess;
}

CUDA cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data)
{
    settle();
    f(data);
    return cudaSuccess;
}

CUDA cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags)
{
    *e = calloc(1, sizeof(double));
    return cudaSuccess;
}

CUDA cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }

CUDA cudaEventDestroy(cudaEvent_t e)
{
    free(e);
    return cudaSuccess;
}

CUDA cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    *(double *)e = now();
    note("record", number_of(s), "%p", (void *)e);
    return cudaSuccess;
}

CUDA cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags)
{
    return cudaEventRecord(e, s);
}

CUDA cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to)
{
    *milliseconds = *(double *)to - *(double *)from;
    return cudaSuccess;
}

/* Copies. ---------------------------------------------------------------------------------------- */

static cudaError_t copy(void *to, const void *from, size_t size, cudaStream_t s, int is_async)
{
    static const char *ways[] = {[H2D] = "h2d", [D2H] = "d2h", [D2D] = "d2d"};
    if (!size) return cudaSuccess;
    Range *target = range_of(to), *source = range_of(from);
    int way = target != device ? D2H : source != device ? H2D : D2D;
    Range *host = way == D2H ? target : source;
    const char *kind = way == D2D ? "device" : host == pinned ? "pinned" : "pageable";
    counters[way]++;
    note("copy", number_of(s), "%s %zu %s %s", ways[way], size, kind, is_async ? "async" : "waits");
    if (lazy && is_async && way == D2H && host == pinned) {
        put_off(to, from, size);
        return cudaSuccess;
    }
    if (way == D2H || !is_async) settle();
    memmove(to, from, size);
    return cudaSuccess;
}

CUDA cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    return copy(to, from, size, 0, 0);
}

CUDA cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                     cudaStream_t s)
{
    return copy(to, from, size, s, 1);
}

CUDA cudaMemsetAsync(void *at, int byte, size_t size, cudaStream_t s)
{
    counters[MEMSETS]++;
    note("memset", number_of(s), "%zu", size);
    memset(at, byte, size);
    return cudaSuccess;
}

CUDA cudaMemset(void *at, int byte, size_t size) { return cudaMemsetAsync(at, byte, size, 0); }

/* Kernels: they are known by name, and only fills are carried out. ------------------------------- */

typedef struct { const void *host; const char *name; } Kernel;
static Kernel *kernels;
static size_t n_kernels;
static int sorted;

OTHER(void **) __cudaRegisterFatBinary(void *binary)
{
    static void *handle;
    return &handle;
}

OTHER(void) __cudaRegisterFunction(void **h, const char *host, char *d, const char *name, int limit,
                                   void *t, void *b, void *bd, void *gd, int *w)
{
    pthread_mutex_lock(&lock);
    if (n_kernels % 4096 == 0) kernels = realloc(kernels, (n_kernels + 4096) * sizeof *kernels);
    kernels[n_kernels++] = (Kernel){host, name};
    sorted = 0;
    pthread_mutex_unlock(&lock);
}

static int by_host(const void *a, const void *b)
{
    const void *x = ((const Kernel *)a)->host, *y = ((const Kernel *)b)->host;
    return (x > y) - (x < y);
}

static const char *name_of(const void *host)
{
    Kernel wanted = {host, NULL};
    pthread_mutex_lock(&lock);
    if (!sorted) qsort(kernels, n_kernels, sizeof *kernels, by_host);
    sorted = 1;
    Kernel *found = bsearch(&wanted, kernels, n_kernels, sizeof *kernels, by_host);
    const char *name = found ? found->name : "?";
    pthread_mutex_unlock(&lock);
    return name;
}

/* The size of what a mangled name begins with; 0 if unknown. */
static size_t size_of(const char *type)
{
    if (!strncmp(type, "N3c104HalfE", 11) || !strncmp(type, "N3c108BFloat16E", 15)) return 2;
    static const char *letters[] = {[1] = "bah", [2] = "st", [4] = "fij", [8] = "dlmxy"};
    for (size_t size = 1; size <= 8; size *= 2)
        if (*type && strchr(letters[size], *type)) return size;
    return 0;
}

/* vectorized_elementwise_kernel<width, FillFunctor<T>, pointers>(int n, FillFunctor<T>, pointers) */
static void fill(const char *name, void **arguments)
{
    const char *functor = strstr(name, "FillFunctorI");
    if (!functor || !strstr(name, "vectorized_elementwise_kernel")) return;
    size_t size = size_of(functor + strlen("FillFunctorI"));
    char *to = *(char **)arguments[2];
    for (int n = *(int *)arguments[0]; size && n > 0; n--, to += size)
        memcpy(to, arguments[1], size);
}

static cudaError_t launch(const void *host, void **arguments, cudaStream_t s)
{
    const char *name = name_of(host);
    counters[LAUNCHES]++;
    note("launch", number_of(s), "%s", name);
    fill(name, arguments);
    return cudaSuccess;
}

CUDA cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared,
                      cudaStream_t s)
{
    return launch(f, arguments, s);
}

CUDA __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments, size_t shared,
                        cudaStream_t s)
{
    return launch(f, arguments, s);
}

CUDA cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **arguments)
{
    return launch(f, arguments, config->stream);
}

CUDA __cudaGetKernel(cudaKernel_t *kernel, const void *host)
{
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}

/* f<<<grid, block, shared, stream>>>(...) is a push, a pop in the host's f, and a launch. */
typedef struct { dim3 grid, block; size_t shared; void *stream; } Configuration;
static __thread Configuration pushed;

OTHER(unsigned) __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream)
{
    pushed = (Configuration){grid, block, shared, stream};
    return 0;
}

CUDA __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

CUDA cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f)
{
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 10 * MAJOR + MINOR;
    return cudaSuccess;
}

CUDA cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block,
                                                            size_t shared, unsigned flags)
{
    *n = 2;
    return cudaSuccess;
}

CUDA cudaGetSymbolAddress(void **at, const void *symbol)
{
    static char variable[1 << 20];
    *at = variable;
    return cudaSuccess;
}

/* The device: figures of an A100, as far as PyTorch reads them. ---------------------------------- */

CUDA cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

CUDA cudaGetDevice(int *number)
{
    *number = 0;
    return cudaSuccess;
}

CUDA cudaSetDevice(int number) { return number ? cudaErrorInvalidDevice : cudaSuccess; }

CUDA cudaDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return cudaSuccess;
}

CUDA cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

CUDA cudaDeviceCanAccessPeer(int *can, int a, int b)
{
    *can = 0;
    return cudaSuccess;
}

CUDA cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

CUDA cudaGetDeviceProperties(struct cudaDeviceProp *p, int number)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, NAME);
    p->totalGlobalMem = device->limit;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 163 << 10;
    p->sharedMemPerMultiprocessor = 164 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 0x7FFFFFFF;
    p->maxGridSize[1] = p->maxGridSize[2] = 0xFFFF;
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = PROCESSORS;
    p->l2CacheSize = 40 << 20;
    p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = 1;
    return cudaSuccess;
}

CUDA cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int number)
{
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, number);
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrUnifiedAddressing: *value = p.unifiedAddressing; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

OTHER(const char *) cudaGetErrorName(cudaError_t error)
{
    return error ? "cudaErrorOfTheNullDevice" : "cudaSuccess";
}

OTHER(const char *) cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorInvalidDevice ? "invalid device ordinal"
           : error ? "error of the null device" : "no error";
}

/* The driver, whose functions PyTorch asks for by name. ------------------------------------------ */

OTHER(int) cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = 1;
    return 0;
}

OTHER(int) cuCtxGetCurrent(void **context)
{
    *context = &streams; /* anything but NULL */
    return 0;
}

OTHER(int) cuGetErrorString(int error, const char **text)
{
    *text = error ? "error of the null device" : "no error";
    return 0;
}

static int nothing(void) { return 0; }

OTHER(int) cuGetProcAddress_v2(const char *name, void **f, int version, unsigned long long flags,
                               int *status)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    *f = found ? found : (void *)nothing;
    if (status) *status = 0;
    return 0;
}

CUDA cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version,
                                      unsigned long long flags,
                                      enum cudaDriverEntryPointQueryResult *result)
{
    if (result) *result = cudaDriverEntryPointSuccess;
    return cuGetProcAddress_v2(name, f, version, flags, NULL);
}

/* cuBLAS: handles that can be told from NULL, and one algorithm to choose from. ------------------- */

#define MAKES(function) \
    OTHER(int) function(void **made) { *made = calloc(1, 64); return 0; }
#define FREES(function) \
    OTHER(int) function(void *made) { free(made); return 0; }

MAKES(cublasCreate_v2)
FREES(cublasDestroy_v2)
MAKES(cublasLtMatmulDescCreate)
FREES(cublasLtMatmulDescDestroy)
MAKES(cublasLtMatrixLayoutCreate)
FREES(cublasLtMatrixLayoutDestroy)
MAKES(cublasLtMatmulPreferenceCreate)
FREES(cublasLtMatmulPreferenceDestroy)

OTHER(int) cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
OTHER(int) cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
OTHER(size_t) cublasLtGetVersion(void) { return 130000; }

OTHER(int) cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b,
                                          void *c, void *d, void *preference, int wanted,
                                          void *results, int *count)
{
    memset(results, 0, 128); /* bytes, not more than one result has; 0 is success */
    *count = 1;
    return 0;
}
