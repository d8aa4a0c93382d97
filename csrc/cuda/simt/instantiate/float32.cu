#include "variant.cuh"

TA_INSTANTIATE_SIMT(float, 64)
TA_INSTANTIATE_SHARED_KERNELS(float)
