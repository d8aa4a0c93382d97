#include "variant.cuh"

TA_INSTANTIATE_SM80(float, 64)
TA_INSTANTIATE_SM80_COMBINE(float)
