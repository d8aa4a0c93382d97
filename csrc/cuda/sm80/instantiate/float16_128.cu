#include "variant.cuh"

TA_INSTANTIATE_SM80(Float16, 128)
