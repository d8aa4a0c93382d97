#include "variant.cuh"

TA_INSTANTIATE_SM90(Float16, 64)
TA_INSTANTIATE_SM90(Float16, 128)
