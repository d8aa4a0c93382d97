#include "variant.cuh"

TA_INSTANTIATE_SIMT(float, 128)
