#include "variant.cuh"

TA_INSTANTIATE_SIMT(double, 64)
TA_INSTANTIATE_SHARED_KERNELS(double)
