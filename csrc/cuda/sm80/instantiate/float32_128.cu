#include "variant.cuh"

TA_INSTANTIATE_SM80(float, 128)
