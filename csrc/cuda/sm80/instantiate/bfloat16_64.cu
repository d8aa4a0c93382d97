#include "variant.cuh"

TA_INSTANTIATE_SM80(BFloat16, 64)
